//! Addresses that a pass may ask for a teacher's answers.

use std::net::IpAddr;

use axum::http::Uri;

/// Whether an address can be asked. Link-local addresses are those of the machines' own services,
/// such as a cloud's metadata, and never those of a teacher.
pub(super) fn check(url: &str) -> Result<(), &'static str> {
    let Ok(uri) = url.parse::<Uri>() else {
        return Err("must be a whole address, such as http://127.0.0.1:8081/predict");
    };
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err("must begin with http:// or https://");
    }
    let Some(authority) = uri.authority() else {
        return Err("must name a host");
    };
    if authority.as_str().contains('@') {
        return Err("must hold no user name; a token goes into KDLORA_TEACHER_TOKEN");
    }
    let host = authority.host().trim_matches(['[', ']']);
    let link_local = match host.parse::<IpAddr>() {
        Ok(IpAddr::V4(address)) => address.is_link_local() || address.is_unspecified(),
        Ok(IpAddr::V6(address)) => {
            let mapped = address.to_ipv4_mapped();
            mapped.is_some_and(|address| address.is_link_local())
                || address.is_unicast_link_local()
                || address.is_unspecified()
        }
        Err(_) => false,
    };
    match link_local {
        true => Err("must not be a link-local address"),
        false => Ok(()),
    }
}
