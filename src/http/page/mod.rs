//! The page at `/`: plain HTML, CSS and ES modules, embedded in the program.
//!
//! The page holds no data of its own: what it shows it asks of the API, with the token that its user
//! gives it. So its files need no access check, and they answer while the server starts.

use axum::extract::Path;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use sha2::{Digest, Sha256};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::error::Problem;

/// Nothing from elsewhere, nothing inline, no frames: a label or a reason that is markup would have
/// nothing to run with, even if the page were to show it as such.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// One embedded file.
struct Asset {
    name: &'static str,
    kind: &'static str,
    bytes: &'static [u8],
}

macro_rules! assets {
    ($($name:literal $kind:literal)+) => {
        &[$(Asset {
            name: $name,
            kind: $kind,
            bytes: include_bytes!(concat!("assets/", $name)),
        },)+]
    };
}

const ASSETS: &[Asset] = assets! {
    "index.html" "text/html; charset=utf-8"
    "style.css" "text/css; charset=utf-8"
    "icon.svg" "image/svg+xml"
    "app.js" "text/javascript; charset=utf-8"
    "api.js" "text/javascript; charset=utf-8"
    "chart.js" "text/javascript; charset=utf-8"
    "distil.js" "text/javascript; charset=utf-8"
    "dom.js" "text/javascript; charset=utf-8"
    "jobs.js" "text/javascript; charset=utf-8"
    "metrics.js" "text/javascript; charset=utf-8"
    "server.js" "text/javascript; charset=utf-8"
    "task.js" "text/javascript; charset=utf-8"
    "tasks.js" "text/javascript; charset=utf-8"
    "try.js" "text/javascript; charset=utf-8"
    "versions.js" "text/javascript; charset=utf-8"
};

/// `/` and the files that it asks for.
pub(super) fn routes() -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(index)).route(
        "/page/{file}",
        get(|Path(name): Path<String>, headers: HeaderMap| async move { file(&name, &headers) }),
    )
}

/// The page for people: tasks, tries, distillations, versions, load.
#[utoipa::path(
    get, path = "/", tag = "page", operation_id = "page", security(()),
    responses(
        (status = 200, description = "HTML", content_type = "text/html", body = String),
        (status = 304, description = "The page is the one that `If-None-Match` names.")
    )
)]
async fn index(headers: HeaderMap) -> Response {
    file("index.html", &headers)
}

fn file(name: &str, headers: &HeaderMap) -> Response {
    let Some(asset) = ASSETS.iter().find(|asset| asset.name == name) else {
        return Problem::UnknownRoute
            .with("the page has no such file")
            .into_response();
    };
    let tag = format!("\"{:x}\"", Sha256::digest(asset.bytes));
    let same = headers
        .get(header::IF_NONE_MATCH)
        .is_some_and(|known| known.as_bytes() == tag.as_bytes());
    let common: [(HeaderName, HeaderValue); 5] = [
        (
            header::CONTENT_SECURITY_POLICY,
            HeaderValue::from_static(POLICY),
        ),
        (
            header::X_CONTENT_TYPE_OPTIONS,
            HeaderValue::from_static("nosniff"),
        ),
        (
            header::REFERRER_POLICY,
            HeaderValue::from_static("no-referrer"),
        ),
        // Asked for anew each time, and sent only if another program serves it by then.
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (header::CONTENT_TYPE, HeaderValue::from_static(asset.kind)),
    ];
    let tag = [(header::ETAG, tag)];
    match same {
        true => (StatusCode::NOT_MODIFIED, common, tag).into_response(),
        false => (common, tag, asset.bytes).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn every_file_of_the_folder_is_served() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/http/page/assets");
        let mut names: Vec<_> = fs::read_dir(folder)
            .expect("the folder")
            .map(|entry| entry.expect("a file").file_name())
            .collect();
        names.sort();
        let mut served: Vec<_> = ASSETS.iter().map(|asset| asset.name).collect();
        served.sort_unstable();
        assert_eq!(names, served);
    }

    #[test]
    fn nothing_comes_from_elsewhere_and_no_text_is_parsed_as_markup() {
        for asset in ASSETS {
            let text = str::from_utf8(asset.bytes).expect("UTF-8");
            let own_names = text.replace("http://www.w3.org/2000/svg", "");
            for word in ["http://", "https://", "<style", "onclick=\"", "style=\""] {
                assert!(!own_names.contains(word), "{}: {word}", asset.name);
            }
            for word in [
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "eval(",
                "document.write",
            ] {
                assert!(!text.contains(word), "{}: {word}", asset.name);
            }
        }
    }

    #[test]
    fn a_file_that_is_known_is_not_sent_again() {
        let first = file("app.js", &HeaderMap::new());
        assert_eq!(first.status(), StatusCode::OK);
        let policy = &first.headers()[header::CONTENT_SECURITY_POLICY];
        assert!(
            policy
                .to_str()
                .is_ok_and(|policy| !policy.contains("unsafe"))
        );
        let tag = first.headers()[header::ETAG].clone();
        let known = HeaderMap::from_iter([(header::IF_NONE_MATCH, tag)]);
        assert_eq!(file("app.js", &known).status(), StatusCode::NOT_MODIFIED);
        assert_eq!(file("style.css", &known).status(), StatusCode::OK);
        let missing = file("../mod.rs", &HeaderMap::new());
        assert_eq!(missing.status(), StatusCode::NOT_FOUND);
    }
}
