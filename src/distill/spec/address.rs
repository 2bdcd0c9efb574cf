//! Addresses that a pass may ask for a teacher's answers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use axum::http::Uri;

/// Whether an address can be asked, as far as its text tells. What a name stands for is checked
/// where a connection is made, see [`is_forbidden`].
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
    match parse_host(authority.host())? {
        Some(address) if is_forbidden(address) => Err(FORBIDDEN),
        _ => Ok(()),
    }
}

/// What is said of an address that [`is_forbidden`].
pub(crate) const FORBIDDEN: &str = "must not be a link-local, unspecified or multicast address, or \
    one of a cloud's metadata service";

/// The address that a host is; `None` for a name.
fn parse_host(host: &str) -> Result<Option<IpAddr>, &'static str> {
    if let Some(address) = host.strip_prefix('[') {
        let address = address.strip_suffix(']').unwrap_or_default();
        let address: Result<Ipv6Addr, _> = address.parse();
        let address = address.map_err(|_| "must hold a whole IPv6 address in the brackets")?;
        return Ok(Some(address.into()));
    }
    if let Ok(address) = host.parse::<Ipv4Addr>() {
        return Ok(Some(address.into()));
    }
    let name = host.strip_suffix('.').unwrap_or(host);
    let is_label = |label: &str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        !label.is_empty() && label.bytes().all(plain)
    };
    if !name.split('.').all(is_label) {
        return Err("must name a host of letters, digits, dashes and dots");
    }
    // Resolvers read 2130706433, 0x7f000001 and 127.1 as addresses.
    let last = name.rsplit('.').next().unwrap_or_default();
    let is_number = last.bytes().all(|byte| byte.is_ascii_digit()) || last.starts_with("0x");
    match is_number || last.starts_with("0X") {
        true => Err("must write an IPv4 address as four decimal numbers"),
        false => Ok(None),
    }
}

/// Whether an address is never a teacher's. Link-local addresses are those of the machines' own
/// services, such as a cloud's metadata; others lead to them by another way of writing.
pub(crate) fn is_forbidden(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => is_forbidden_v4(address),
        IpAddr::V6(address) => is_forbidden_v6(address),
    }
}

fn is_forbidden_v4(address: Ipv4Addr) -> bool {
    // Metadata of Alibaba's and Azure's clouds.
    const METADATA: [Ipv4Addr; 2] = [
        Ipv4Addr::new(100, 100, 100, 200),
        Ipv4Addr::new(168, 63, 129, 16),
    ];
    let first = address.octets()[0];
    // 0.0.0.0/8 is this machine, 240.0.0.0/4 is reserved or broadcast.
    first == 0
        || first >= 240
        || address.is_link_local()
        || address.is_multicast()
        || METADATA.contains(&address)
}

fn is_forbidden_v6(address: Ipv6Addr) -> bool {
    // Metadata of Amazon's cloud.
    const METADATA: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
    let segments = address.segments();
    let embedded = |high: u16, low: u16| {
        let address = Ipv4Addr::from((u32::from(high) << 16) | u32::from(low));
        is_forbidden_v4(address) || address.is_loopback() || address.is_private()
    };
    let leads_elsewhere = match segments {
        // NAT64, 6to4.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => embedded(high, low),
        // NAT64 of a network's own, Teredo, addresses that were meant to be IPv4's.
        [0x64, 0xff9b, 1, ..] | [0x2001, 0, ..] => true,
        [0, 0, 0, 0, 0, 0, ..] => !address.is_loopback(),
        _ => false,
    };
    leads_elsewhere
        || address.is_unicast_link_local()
        || address.is_multicast()
        || address == METADATA
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_services_are_forbidden_in_every_form() {
        for text in [
            "0.0.0.0",
            "0.1.2.3",
            "169.254.169.254",
            "224.0.0.1",
            "255.255.255.255",
            "100.100.100.200",
            "168.63.129.16",
            "::",
            "::169.254.169.254",
            "::ffff:169.254.169.254",
            "::ffff:0.0.0.0",
            "::ffff:224.0.0.1",
            "fe80::1",
            "ff02::1",
            "fd00:ec2::254",
            "64:ff9b::169.254.169.254",
            "64:ff9b::127.0.0.1",
            "64:ff9b::10.0.0.1",
            "64:ff9b:1::1",
            "2002:a9fe:a9fe::1",
            "2001::1",
        ] {
            assert!(is_forbidden(text.parse().unwrap()), "{text}");
        }
        for text in [
            "127.0.0.1",
            "10.0.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "93.184.216.34",
            "::1",
            "::ffff:10.0.0.1",
            "fd12:3456::1",
            "2606:2800:220:1::1",
            "64:ff9b::93.184.216.34",
        ] {
            assert!(!is_forbidden(text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn hosts_have_one_way_of_writing() {
        let host = |host: &str| check(&format!("http://{host}:8081/predict"));
        for good in [
            "127.0.0.1",
            "localhost",
            "teacher",
            "teacher.example.org.",
            "t2.example",
            "[::1]",
            "my_service",
        ] {
            assert_eq!(host(good), Ok(()), "{good}");
        }
        for bad in [
            "0",
            "2130706433",
            "0x7f000001",
            "0X7f000001",
            "127.1",
            "127.0.1",
            "0177.0.0.1",
            "127.0.0.1.",
            "127.0.0.0x1",
            "1.2.3.4.5",
            "[fe80::1%25eth0]",
            "[::1",
            "[localhost]",
            "a..b",
            "%6c%6f",
        ] {
            assert!(host(bad).is_err(), "{bad}");
        }
    }
}
