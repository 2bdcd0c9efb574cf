//! Looks a teacher's name up, and refuses what it stands for if that is not a teacher's.
//!
//! ureq connects to the very addresses that this returns, so that a name cannot stand for one
//! address when it is checked and for another when it is used.

use std::net::SocketAddr;

use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

use crate::distill::spec::address;

/// An address that is not connected to.
#[derive(Debug, thiserror::Error)]
pub(super) enum AddressError {
    #[error("{host} stands for {address}, which {reason}", reason = address::FORBIDDEN)]
    Forbidden { host: String, address: SocketAddr },
    #[error(
        "{host} stands for {address}, which is not an address of this machine: a token is sent over \
         http to these only"
    )]
    NotLocal { host: String, address: SocketAddr },
}

#[derive(Debug)]
pub(super) struct CheckedResolver<R = DefaultResolver> {
    pub(super) inner: R,
    /// Only addresses of this machine may be connected to.
    pub(super) is_local: bool,
}

impl<R: Resolver> Resolver for CheckedResolver<R> {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let addresses = self.inner.resolve(uri, config, timeout)?;
        for address in addresses.iter().copied() {
            let host = || uri.host().unwrap_or_default().to_owned();
            let refused = if address::is_forbidden(address.ip()) {
                AddressError::Forbidden {
                    host: host(),
                    address,
                }
            } else if self.is_local && !address.ip().to_canonical().is_loopback() {
                AddressError::NotLocal {
                    host: host(),
                    address,
                }
            } else {
                continue;
            };
            return Err(ureq::Error::Other(Box::new(refused)));
        }
        Ok(addresses)
    }
}
