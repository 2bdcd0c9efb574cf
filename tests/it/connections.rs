//! Clients that take connections and give nothing, and what the others notice of it.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use serde_json::json;

use crate::common::{Install, PATIENCE, POLL, Server, is_over, job, letters_or_digits, queue};

const CLASSIFY: &str = "/v1/classify/pairs";
/// Open to everybody, and a megabyte.
const LARGE: &str = "/docs/swagger-ui-bundle.js";

fn start(install: &Install, options: &[&str]) -> Server {
    Server::start(install.command().args(options))
}

fn address(server: &Server) -> SocketAddr {
    let address = server.url.strip_prefix("http://").expect("a URL");
    address.parse().expect("an address")
}

fn head(method: &str, path: &str, lines: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n")
}

/// Opens a connection and sends `bytes`.
fn open(server: &Server, bytes: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address(server)).expect("a connection");
    stream.write_all(bytes.as_bytes()).expect("sent");
    stream
}

/// All that comes until the server closes the connection, or resets it.
fn rest(stream: &mut TcpStream) -> Vec<u8> {
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => panic!("the connection stays open: {error}"),
    }
    bytes
}

fn status(answer: &[u8]) -> u16 {
    let line = String::from_utf8_lossy(&answer[..answer.len().min(12)]).into_owned();
    let status = line.strip_prefix("HTTP/1.1 ").map(str::parse);
    status
        .and_then(Result::ok)
        .unwrap_or_else(|| panic!("no answer: {line:?}"))
}

/// Asks on a connection of its own, and closes it.
fn ask(server: &Server, path: &str) -> Vec<u8> {
    rest(&mut open(
        server,
        &head("GET", path, "Connection: close\r\n"),
    ))
}

/// Opens connections that take every place. Each has been accepted when its first answer is there.
fn take_places(server: &Server, count: usize) -> Vec<TcpStream> {
    let take = |_| {
        let mut stream = open(server, &head("GET", "/healthz", ""));
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("an answer");
        stream
    };
    (0..count).map(take).collect()
}

#[tokio::test]
async fn answers_that_nobody_reads_do_not_stop_the_server() {
    let install = Install::new();
    let server = start(
        &install,
        &["--max-connections", "4", "--write-timeout", "500ms"],
    );
    // More than fits into the buffers of a connection.
    let requests = head("GET", LARGE, "").repeat(20);
    let greedy: Vec<TcpStream> = (0..40).map(|_| open(&server, &requests)).collect();
    let deadline = Instant::now() + PATIENCE;
    while server
        .post(CLASSIFY, &json!({"inputs": "the cat sat"}))
        .await
        .0
        != 200
    {
        assert!(Instant::now() < deadline, "the server stays full");
        thread::sleep(POLL);
    }
    assert_eq!(server.get("/healthz").await.0, 200);
    for mut stream in greedy {
        let taken = rest(&mut stream).len();
        assert!(taken < 20_000_000, "{taken} bytes were sent");
    }
}

#[tokio::test]
async fn an_answer_that_is_read_slowly_ends() {
    let install = Install::new();
    let server = start(&install, &["--answer-timeout", "300ms"]);
    let mut stream = open(&server, &head("GET", LARGE, "").repeat(20));
    let begin = Instant::now();
    let mut bytes = [0; 16 * 1024];
    let mut taken = 0;
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => break,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
            Ok(more) => taken += more,
            Err(error) => panic!("{error}"),
        }
        assert!(begin.elapsed() < PATIENCE, "{taken} bytes, and no end");
        thread::sleep(POLL);
    }
    assert!(taken < 20_000_000, "{taken} bytes were sent");
}

#[tokio::test]
async fn health_and_metrics_have_places_of_their_own() {
    let install = Install::new();
    let server = start(&install, &["--max-connections", "3"]);
    let mut places = take_places(&server, 3);
    for path in ["/healthz", "/readyz", "/health", "/metrics"] {
        assert_eq!(status(&ask(&server, path)), 200, "{path}");
    }
    let (code, problem) = {
        let full = reqwest::Client::new();
        let request = full.post(format!("{}{CLASSIFY}", server.url));
        let answer = request
            .json(&json!({"inputs": "a"}))
            .send()
            .await
            .expect("an answer");
        assert_eq!(answer.headers()["retry-after"], "1");
        (
            answer.status().as_u16(),
            answer.text().await.expect("a body"),
        )
    };
    assert_eq!(code, 503);
    assert!(problem.contains("--max-connections"), "{problem}");
    // A connection of the reserve is closed behind its answer: it does not hold its place.
    for _ in 0..40 {
        let mut kept = open(&server, &head("GET", "/healthz", ""));
        assert_eq!(status(&rest(&mut kept)), 200);
    }
    drop(places.pop());
    let deadline = Instant::now() + PATIENCE;
    while server.post(CLASSIFY, &json!({"inputs": "a"})).await.0 != 200 {
        assert!(Instant::now() < deadline, "the free place is not given out");
        thread::sleep(POLL);
    }
}

#[tokio::test]
async fn a_listener_for_health_alone_answers_nothing_else() {
    let install = Install::new();
    let free = TcpListener::bind("127.0.0.1:0").expect("a port");
    let health = free.local_addr().expect("an address");
    drop(free);
    let server = start(
        &install,
        &[
            "--max-connections",
            "1",
            "--health-bind",
            &health.to_string(),
        ],
    );
    // All places, those of the reserve too, are taken by clients that say nothing.
    let _silent: Vec<_> = (0..64).map(|_| open(&server, "")).collect();
    let get = |path: &str| server.client.get(format!("http://{health}{path}")).send();
    for path in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(
            get(path).await.expect("an answer").status().as_u16(),
            200,
            "{path}"
        );
    }
    for path in ["/v1/tasks", "/admin/jobs", "/"] {
        assert_eq!(
            get(path).await.expect("an answer").status().as_u16(),
            404,
            "{path}"
        );
    }
}

#[tokio::test]
async fn streams_of_events_leave_places_for_others() {
    let install = Install::new();
    let server = start(&install, &["--max-connections", "8"]);
    let data = json!({"train": {"rows": letters_or_digits(40)}});
    let spec = json!({"task": "followed", "data": data, "training": {"epochs": 100}});
    let path = queue(&server, &spec).await;
    let events = head("GET", &format!("{path}/events"), "");
    let mut streams: Vec<_> = (0..2).map(|_| open(&server, &events)).collect();
    for stream in &mut streams {
        let mut first = [0; 12];
        stream.read_exact(&mut first).expect("an answer");
        assert_eq!(status(&first), 200);
    }
    assert_eq!(status(&ask(&server, &format!("{path}/events"))), 503);
    assert_eq!(server.post(CLASSIFY, &json!({"inputs": "a"})).await.0, 200);
    drop(streams.pop());
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut next = open(&server, &events);
        let mut first = [0; 12];
        next.read_exact(&mut first).expect("an answer");
        if status(&first) == 200 {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "the place is not given out again"
        );
        thread::sleep(POLL);
    }
    let _ = server
        .client
        .delete(format!("{}{path}", server.url))
        .send()
        .await;
}

#[test]
fn a_body_that_trickles_is_given_up_on_every_route_that_takes_one() {
    let install = Install::new();
    let server = start(&install, &["--read-timeout", "1s"]);
    let json = "Content-Length: 100000\r\nContent-Type: application/json\r\n";
    let form = "Content-Length: 100000\r\nContent-Type: multipart/form-data; boundary=x\r\n";
    let part = "--x\r\nContent-Disposition: form-data; name=\"spec\"\r\n\r\n";
    let routes = [
        ("/admin/distill", json, ""),
        ("/admin/distill", form, part),
        ("/admin/adapters", json, ""),
        ("/admin/adapters", form, part),
        ("/admin/tasks/pairs/promote", json, ""),
        ("/admin/tasks/pairs/teacher", json, ""),
        (CLASSIFY, json, ""),
    ];
    let mut streams = routes.map(|(path, lines, start)| {
        let stream = open(&server, &(head("POST", path, lines) + start));
        stream.set_nonblocking(true).expect("no blocking");
        (path, stream)
    });
    let deadline = Instant::now() + PATIENCE;
    for (path, stream) in &mut streams {
        let mut answer = [0; 12];
        while stream.peek(&mut answer).is_err() {
            assert!(Instant::now() < deadline, "{path} waits for ever");
            // It may be answered, and closed, at any moment.
            let _ = stream.write_all(b" ");
            thread::sleep(POLL);
        }
        assert_eq!(status(&answer), 408, "{path}");
    }
}

/// The server with at most so many open files.
fn with_open_files(install: &Install, soft: u64, hard: u64, options: &[&str]) -> Command {
    let command = install.command();
    let mut limited = Command::new("sh");
    limited
        .arg("-c")
        .arg(format!(
            "ulimit -Sn {soft}; ulimit -Hn {hard}; exec \"$0\" \"$@\""
        ))
        .arg(command.get_program())
        .args(command.get_args())
        .args(options)
        .stdout(Stdio::piped());
    limited
}

#[test]
fn the_soft_limit_of_open_files_is_raised() {
    let install = Install::new();
    let server = Server::start(&mut with_open_files(&install, 64, 500, &[]));
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.id())).expect("Linux");
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let words: Vec<&str> = line.expect("a limit").split_whitespace().collect();
    assert_eq!(words[3..5], ["500", "500"]);
}

#[tokio::test]
async fn connections_never_take_the_last_files() {
    let install = Install::new();
    let options = ["--read-timeout", "60s"];
    let server = Server::start(&mut with_open_files(&install, 300, 300, &options));
    // The client keeps this connection.
    assert_eq!(server.get("/healthz").await.0, 200);
    let _silent: Vec<_> = (0..290).map(|_| open(&server, "")).collect();
    let data = json!({"train": {"rows": letters_or_digits(40)}});
    let spec = json!({"task": "beside", "data": data, "training": {"epochs": 1}, "promote": false});
    let path = queue(&server, &spec).await;
    let job = job(&server, &path, is_over).await;
    assert_eq!(job["state"], "succeeded", "{job}");
}
