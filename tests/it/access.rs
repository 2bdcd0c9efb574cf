//! Who may change a server without tokens, and what its audit log says of it.

use std::fs::{self, File};
use std::path::PathBuf;

use reqwest::Method;
use serde_json::json;
use tempfile::TempDir;

use crate::common::{Install, Server};

/// A server whose log goes to a file.
struct Logged {
    server: Server,
    _folder: TempDir,
    log: PathBuf,
}

impl Logged {
    fn start(install: &Install, options: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let log = folder.path().join("log");
        let file = File::create(&log).expect("a file");
        let server = Server::start(install.command().args(options).stderr(file));
        Self {
            server,
            _folder: folder,
            log,
        }
    }

    fn audit(&self) -> Vec<String> {
        let log = fs::read_to_string(&self.log).expect("the log");
        let lines = log.lines().filter(|line| line.contains("admin act"));
        lines.map(str::to_owned).collect()
    }

    async fn status(&self, method: Method, path: &str, headers: &[(&str, &str)]) -> u16 {
        let request = self
            .server
            .client
            .request(method, format!("{}{path}", self.server.url));
        let request = headers.iter().fold(request, |request, (name, value)| {
            request.header(*name, *value)
        });
        request.send().await.expect("an answer").status().as_u16()
    }
}

#[tokio::test]
async fn without_tokens_only_programs_of_this_machine_change_anything() {
    let install = Install::new();
    let logged = Logged::start(&install, &[]);
    let rollback = "/admin/tasks/pairs/rollback";
    for headers in [
        [("host", "classifier.example.com")].as_slice(),
        &[("host", "[::1].evil.example")],
        &[("x-forwarded-for", "203.0.113.9")],
        &[("x-forwarded-proto", "https")],
        &[("forwarded", "for=203.0.113.9")],
        &[("x-real-ip", "203.0.113.9")],
        &[("via", "1.1 proxy")],
        &[("origin", "http://localhost:3000")],
        &[("origin", "https://evil.example")],
        &[("origin", "null")],
        &[("sec-fetch-site", "cross-site")],
        &[("sec-fetch-site", "same-site")],
    ] {
        let status = logged.status(Method::POST, rollback, headers).await;
        assert_eq!(status, 403, "{headers:?}");
    }
    assert_eq!(logged.audit().len(), 12);
    // A program, and the server's own page: there is nothing to roll back.
    let own = logged.server.url.as_str();
    for headers in [
        [].as_slice(),
        &[("origin", own), ("sec-fetch-site", "same-origin")],
    ] {
        let status = logged.status(Method::POST, rollback, headers).await;
        assert_eq!(status, 409, "{headers:?}");
    }
}

#[tokio::test]
async fn a_name_that_is_pointed_at_this_machine_reads_nothing() {
    let install = Install::new();
    let options = ["--allowed-hosts", "models.example"];
    let logged = Logged::start(&install, &options);
    for path in ["/v1/tasks", "/metrics", "/info", "/v2/models/pairs"] {
        for (host, expected) in [("evil.example", 403), ("models.example", 200)] {
            let path = path.replace("/info", "/tasks/pairs/info");
            let status = logged.status(Method::GET, &path, &[("host", host)]).await;
            assert_eq!(status, expected, "{path} of {host}");
        }
    }
    let open = logged.status(Method::GET, "/healthz", &[("host", "evil.example")]);
    assert_eq!(open.await, 200);
}

#[tokio::test]
async fn who_is_refused_is_written_down_by_name() {
    let install = Install::new();
    let tokens = tempfile::tempdir().expect("a folder");
    let file = |name: &str, text: &str| {
        let path = tokens.path().join(name);
        fs::write(&path, text).expect("a file");
        path.to_str().expect("UTF-8").to_owned()
    };
    let admins = file("admins", "ada:an-admin-token-0123456\n");
    let readers = file("readers", "ray:a-reader-token-012345\n");
    let options = ["--admin-token-file", &admins, "--api-token-file", &readers];
    let logged = Logged::start(&install, &options);
    for (token, actor, status) in [
        ("a-reader-token-012345", "ray", 403),
        ("a-wrong-token-0123456", "nobody", 401),
    ] {
        let bearer = format!("Bearer {token}");
        for method in [Method::GET, Method::DELETE] {
            let headers = [("authorization", bearer.as_str())];
            let answered = logged
                .status(method.clone(), "/admin/jobs/x", &headers)
                .await;
            assert_eq!(answered, status);
            let line = logged.audit().pop().expect("a line");
            let parts = [method.as_str(), actor, &format!("status={status}")];
            assert!(parts.iter().all(|part| line.contains(part)), "{line}");
        }
    }
    let admin = [("authorization", "Bearer an-admin-token-0123456")];
    assert_eq!(logged.status(Method::GET, "/admin/jobs", &admin).await, 200);
    assert_eq!(logged.audit().len(), 4);
    let (status, _) = logged
        .server
        .post("/v1/classify/pairs", &json!({"inputs": "a"}))
        .await;
    assert_eq!(status, 401);
}
