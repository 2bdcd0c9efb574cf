//! Brings requests to the form that routes, access rules and extractors expect.

use std::convert::Infallible;

use axum::body::Body;
use axum::extract::Request;
use axum::http::uri::{PathAndQuery, Uri};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tower::{ServiceExt, service_fn};
use tower_http::decompression::{DecompressionBody, RequestDecompression};

use super::error::Problem;
use super::openapi::PAGES;

/// Content encodings that [`decompress`] takes.
const ENCODINGS: HeaderValue = HeaderValue::from_static("gzip, zstd, identity");

/// Removes one slash from the end of the path, and changes nothing else: `//`, `%2f` and upper case
/// are other paths.
///
/// This must run before routing, so that access is decided by the path that is routed.
pub(super) fn without_trailing_slash(mut request: Request) -> Request {
    if let Some(uri) = trimmed(request.uri()) {
        *request.uri_mut() = uri;
    }
    request
}

fn trimmed(uri: &Uri) -> Option<Uri> {
    let path = uri.path().strip_suffix('/')?;
    // The pages of the API's documentation are a folder with relative links.
    if path.is_empty() || path.ends_with('/') || path == PAGES {
        return None;
    }
    let target = match uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(target).ok()?);
    Uri::from_parts(parts).ok()
}

/// Decompresses the body by its `Content-Encoding` while the handler reads it. Limits on the body
/// hold for what comes out.
pub(super) async fn decompress(mut request: Request, next: Next) -> Response {
    let encoding = match encoding(request.headers()) {
        Ok(encoding) => encoding,
        Err(encoding) => {
            let problem = Problem::UnsupportedMediaType.with(format!(
                "the content encoding {encoding:?} is not supported; send the body as gzip, zstd or \
                 uncompressed"
            ));
            return ([(header::ACCEPT_ENCODING, ENCODINGS)], problem).into_response();
        }
    };
    let headers = request.headers_mut();
    headers.remove(header::CONTENT_ENCODING);
    let Some(encoding) = encoding else {
        return next.run(request).await;
    };
    headers.insert(header::CONTENT_ENCODING, encoding);
    let handler = service_fn(|request: axum::http::Request<DecompressionBody<Body>>| {
        let next = next.clone();
        async move { Ok::<_, Infallible>(next.run(request.map(Body::new)).await) }
    });
    match RequestDecompression::new(handler).oneshot(request).await {
        Ok(response) => response.map(Body::new),
        Err(never) => match never {},
    }
}

/// Returns the encoding by the name that tower-http knows, or `None` for a plain body. The error is the
/// value of the header, if the encoding is not supported or there are several.
fn encoding(headers: &HeaderMap) -> Result<Option<HeaderValue>, String> {
    let names = headers.get_all(header::CONTENT_ENCODING).iter();
    let names: Vec<String> = names
        .map(|name| {
            String::from_utf8_lossy(name.as_bytes())
                .trim()
                .to_lowercase()
        })
        .collect();
    let names = names.join(", ");
    match names.as_str() {
        "" | "identity" => Ok(None),
        "gzip" | "x-gzip" => Ok(Some(HeaderValue::from_static("gzip"))),
        "zstd" => Ok(Some(HeaderValue::from_static("zstd"))),
        _ => Err(names),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slash_at_the_end_is_removed_and_nothing_else() {
        for (uri, expected) in [
            ("/v1/tasks/", "/v1/tasks"),
            ("/v1/tasks/?limit=5&after=a/", "/v1/tasks?limit=5&after=a/"),
            ("http://host:80/predict/", "http://host:80/predict"),
            ("/", "/"),
            ("//", "//"),
            ("/v1/tasks//", "/v1/tasks//"),
            ("//v1/tasks/", "//v1/tasks"),
            ("/v1%2ftasks%2f", "/v1%2ftasks%2f"),
            ("/V1/Tasks/", "/V1/Tasks"),
            ("/docs/", "/docs/"),
            ("/v1/tasks", "/v1/tasks"),
        ] {
            let uri: Uri = uri.parse().expect(uri);
            let given = trimmed(&uri).unwrap_or(uri);
            assert_eq!(given.to_string(), expected);
        }
    }

    #[test]
    fn an_encoding_has_one_name_in_any_case() {
        let encoding = |names: &[&'static str]| {
            let headers = names
                .iter()
                .map(|name| (header::CONTENT_ENCODING, HeaderValue::from_static(name)));
            super::encoding(&headers.collect())
        };
        let known = |name| Ok(Some(HeaderValue::from_static(name)));
        for (names, expected) in [
            (&[][..], Ok(None)),
            (&["identity"], Ok(None)),
            (&[""], Ok(None)),
            (&["gzip"], known("gzip")),
            (&["GZip"], known("gzip")),
            (&["x-gzip"], known("gzip")),
            (&["zstd"], known("zstd")),
            (&["br"], Err("br".to_owned())),
            (&["gzip, gzip"], Err("gzip, gzip".to_owned())),
            (&["gzip", "zstd"], Err("gzip, zstd".to_owned())),
        ] {
            assert_eq!(encoding(names), expected, "{names:?}");
        }
    }
}
