//! What tells a program of this machine from a proxy, and from a page in a browser of this machine.
//!
//! A page from elsewhere reaches a server on a loopback address either under its own origin, which
//! the browser tells in `Origin` and `Sec-Fetch-Site`, or by pointing its own host name at 127.0.0.1
//! (DNS rebinding), which shows in `Host`. A proxy on this machine has a loopback address as well;
//! that it is a proxy shows in the headers that it adds.

use std::net::{IpAddr, Ipv6Addr};

use axum::http::{HeaderMap, HeaderName, Method, Uri, header};

/// What is known of a request's sender beside the token.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sender<'a> {
    pub(super) method: &'a Method,
    pub(super) uri: &'a Uri,
    pub(super) headers: &'a HeaderMap,
    /// `None` where there is no connection, which is in unit tests only.
    pub(super) peer: Option<IpAddr>,
}

impl<'a> Sender<'a> {
    /// Whether the request comes from a program of this machine, without a proxy, or from a page
    /// that this server has given out.
    pub(super) fn is_local_program(self) -> bool {
        let hosts: Vec<&str> = self.hosts().collect();
        let is_own_origin = |origin: &str| {
            let host = origin.strip_prefix("http://");
            host.is_some_and(|host| hosts.iter().any(|own| own.eq_ignore_ascii_case(host)))
        };
        let is_elsewhere = |site: &str| ["cross-site", "same-site"].contains(&site);
        self.peer
            .is_none_or(|peer| peer.to_canonical().is_loopback())
            && !hosts.is_empty()
            && hosts.iter().all(|host| is_loopback(host))
            && !self.headers.keys().any(is_of_proxy)
            && self.values(header::ORIGIN).all(is_own_origin)
            && (self.method.is_safe()
                || !self
                    .values(HeaderName::from_static("sec-fetch-site"))
                    .any(is_elsewhere))
    }

    /// Whether the request is made to this machine, or to one of the `allowed` names.
    pub(super) fn is_for(self, allowed: &[String]) -> bool {
        self.hosts().all(|host| {
            let is_allowed = |name: &str| allowed.iter().any(|one| one.eq_ignore_ascii_case(name));
            is_loopback(host) || host_name(host).is_some_and(is_allowed)
        })
    }

    /// The authorities that the request is made to: that of its address, if it has one, counts as
    /// the header does.
    fn hosts(self) -> impl Iterator<Item = &'a str> {
        let of_uri = self.uri.authority().map(|authority| authority.as_str());
        self.values(header::HOST).chain(of_uri)
    }

    /// The values of a header. One that is not text becomes an empty one, which nothing allows.
    fn values(self, name: HeaderName) -> impl Iterator<Item = &'a str> {
        let values = self.headers.get_all(name).into_iter();
        values.map(|value| value.to_str().unwrap_or_default())
    }
}

/// Whether proxies add this header.
fn is_of_proxy(name: &HeaderName) -> bool {
    let name = name.as_str();
    ["forwarded", "via", "x-real-ip"].contains(&name) || name.starts_with("x-forwarded-")
}

/// Whether `host[:port]` names this machine.
fn is_loopback(authority: &str) -> bool {
    host_name(authority).is_some_and(|host| {
        let address = host.parse::<IpAddr>();
        host.eq_ignore_ascii_case("localhost")
            || address.is_ok_and(|address| address.to_canonical().is_loopback())
    })
}

/// The host in `host[:port]`, without the brackets of an IPv6 address.
fn host_name(authority: &str) -> Option<&str> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            host.parse::<Ipv6Addr>().ok()?;
            (host, port)
        }
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    let digits = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit());
    (port.is_empty() || port.strip_prefix(':').is_some_and(digits)).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request with these headers, from this address.
    fn check<T>(
        method: Method,
        uri: &str,
        peer: &str,
        headers: &[(&'static str, &str)],
        check: impl Fn(Sender<'_>) -> T,
    ) -> T {
        let headers = headers.iter().map(|(name, value)| {
            let name = HeaderName::from_static(name);
            (name, value.parse().expect("a header value"))
        });
        check(Sender {
            method: &method,
            uri: &uri.parse().expect("an address"),
            headers: &headers.collect(),
            peer: Some(peer.parse().expect("an IP address")),
        })
    }

    fn local(sender: Sender<'_>) -> bool {
        sender.is_local_program()
    }

    fn is_local(method: Method, headers: &[(&'static str, &str)]) -> bool {
        check(method, "/admin/jobs", "127.0.0.1", headers, local)
    }

    #[test]
    fn programs_of_this_machine_are_local() {
        for host in [
            "127.0.0.1:8080",
            "localhost:8080",
            "LOCALHOST",
            "[::1]:8080",
            "[::1]",
            "[::ffff:127.0.0.1]:1",
            "127.8.0.1",
        ] {
            assert!(is_local(Method::POST, &[("host", host)]), "{host}");
        }
    }

    #[test]
    fn other_hosts_are_not_local_however_they_are_written() {
        for host in [
            "evil.example:8080",
            "[::1].evil.example",
            "[::1]evil.example:80",
            "[localhost]:80",
            "localhost.evil.example",
            "localhost@evil.example",
            "localhost:80@evil.example",
            "127.0.0.1.evil.example",
            "0.0.0.0:8080",
            "[::]:8080",
            "10.0.0.1",
            "[::1",
            "",
        ] {
            assert!(!is_local(Method::GET, &[("host", host)]), "{host}");
        }
        assert!(!is_local(Method::GET, &[]));
        let both = [("host", "localhost"), ("host", "evil.example")];
        assert!(!is_local(Method::GET, &both));
        let absolute = |uri| {
            let host = [("host", "localhost")];
            check(Method::GET, uri, "127.0.0.1", &host, local)
        };
        assert!(absolute("http://localhost:8080/admin/jobs"));
        assert!(!absolute("http://evil.example/admin/jobs"));
    }

    #[test]
    fn peers_of_other_machines_and_proxies_are_not_local() {
        for (peer, expected) in [
            ("127.0.0.1", true),
            ("::1", true),
            ("::ffff:127.0.0.1", true),
            ("10.0.0.1", false),
            ("::ffff:10.0.0.1", false),
        ] {
            let host = [("host", "localhost")];
            let is_local = check(Method::GET, "/", peer, &host, local);
            assert_eq!(is_local, expected, "{peer}");
        }
        for name in [
            "forwarded",
            "via",
            "x-real-ip",
            "x-forwarded-for",
            "x-forwarded-host",
            "x-forwarded-proto",
            "x-forwarded-server",
        ] {
            let headers = [("host", "localhost"), (name, "")];
            assert!(!is_local(Method::GET, &headers), "{name}");
        }
    }

    #[test]
    fn only_pages_of_this_server_are_local() {
        let page = |method, origin, site| {
            let host = ("host", "localhost:8080");
            is_local(
                method,
                &[host, ("origin", origin), ("sec-fetch-site", site)],
            )
        };
        let own = "http://localhost:8080";
        assert!(page(Method::POST, own, "same-origin"));
        assert!(page(Method::POST, "http://LOCALHOST:8080", "none"));
        for origin in [
            "http://localhost:3000",
            "http://localhost",
            "http://127.0.0.1:8080",
            "https://localhost:8080",
            "https://evil.example",
            "http://evil.example:8080",
            "null",
            "",
        ] {
            assert!(!page(Method::GET, origin, "same-origin"), "{origin}");
        }
        for site in ["cross-site", "same-site"] {
            assert!(!page(Method::POST, own, site), "{site}");
            assert!(!page(Method::DELETE, own, site), "{site}");
            assert!(page(Method::GET, own, site), "{site}");
        }
    }

    #[test]
    fn names_that_are_allowed_are_asked_for_beside_this_machine() {
        let allowed = ["classifier.example.org".to_owned()];
        let is_for = |host: &str| {
            let host = [("host", host)];
            check(Method::GET, "/", "127.0.0.1", &host, |sender| {
                sender.is_for(&allowed)
            })
        };
        for host in [
            "localhost:1",
            "Classifier.example.org:443",
            "classifier.example.org",
        ] {
            assert!(is_for(host), "{host}");
        }
        for host in [
            "evil.example",
            "a.classifier.example.org",
            "[::1].evil.example",
        ] {
            assert!(!is_for(host), "{host}");
        }
        let none = |sender: Sender<'_>| sender.is_for(&[]);
        assert!(check(Method::GET, "/", "127.0.0.1", &[], none));
    }
}
