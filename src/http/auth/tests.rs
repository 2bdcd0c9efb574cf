use std::future::pending;

use axum::Router;
use axum::http::{HeaderName, Method, Uri};
use axum::middleware::from_fn_with_state;
use axum::routing::post;
use tokio::sync::Notify;
use tower::ServiceExt;

use super::*;

const ADMIN: &str = "admin-token-0123456";
const READER: &str = "reader-token-012345";

fn headers(pairs: &[(HeaderName, &str)]) -> HeaderMap {
    pairs
        .iter()
        .map(|(name, value)| (name.clone(), value.parse().expect("a header value")))
        .collect()
}

fn tokens(text: &str) -> Option<Arc<Tokens>> {
    Some(Arc::new(Tokens::fixed(text, "a test").expect("tokens")))
}

fn access(options: AccessOptions) -> Access {
    Access::new(options)
}

fn both() -> Access {
    access(AccessOptions {
        readers: tokens(&format!("ray:{READER}")),
        admins: tokens(&format!("ada:{ADMIN}")),
        ..AccessOptions::default()
    })
}

/// The name of who gets in, or why nobody does.
fn outcome(
    access: &Access,
    role: Role,
    pairs: &[(HeaderName, &str)],
) -> Result<Option<String>, Problem> {
    let (caller, outcome) = admit(access, role, &headers(pairs));
    let name = match caller {
        Caller::Token { token, .. } => Some(token.name.clone()),
        Caller::Anybody | Caller::Nobody => None,
    };
    outcome.map(|()| name).map_err(|error| error.problem())
}

fn admit(access: &Access, role: Role, headers: &HeaderMap) -> (Caller, Result<(), ApiError>) {
    let sender = Sender {
        method: &Method::POST,
        uri: &Uri::from_static("/"),
        headers,
        peer: None,
    };
    access.admit(role, sender)
}

fn with(access: &Access, role: Role, value: &str) -> Result<Option<String>, Problem> {
    outcome(access, role, &[(header::AUTHORIZATION, value)])
}

#[test]
fn only_the_right_token_opens() {
    let access = both();
    let ada = Ok(Some("ada".to_owned()));
    for scheme in ["Bearer", "bearer", "BEARER "] {
        let value = format!("{scheme} {ADMIN}");
        assert_eq!(with(&access, Role::Admin, &value), ada, "{scheme}");
    }
    for wrong in [
        &format!("Bearer {ADMIN}2"),
        &format!("Bearer {}", &ADMIN[1..]),
        "Bearer ",
        &format!("Basic {ADMIN}"),
        ADMIN,
        "é",
    ] {
        assert_eq!(
            with(&access, Role::Admin, wrong),
            Err(Problem::Unauthorized),
            "{wrong}"
        );
    }
    assert_eq!(
        outcome(&access, Role::Admin, &[]),
        Err(Problem::Unauthorized)
    );
}

#[test]
fn an_admin_may_read_and_a_reader_may_not_change() {
    let access = both();
    let reader = format!("Bearer {READER}");
    assert_eq!(
        with(&access, Role::Reader, &reader),
        Ok(Some("ray".to_owned()))
    );
    assert_eq!(with(&access, Role::Admin, &reader), Err(Problem::Forbidden));
    let admin = format!("Bearer {ADMIN}");
    assert_eq!(
        with(&access, Role::Reader, &admin),
        Ok(Some("ada".to_owned()))
    );
    assert_eq!(
        outcome(&access, Role::Reader, &[]),
        Err(Problem::Unauthorized)
    );
}

#[test]
fn without_tokens_for_readers_everybody_reads() {
    let access = access(AccessOptions {
        admins: tokens(ADMIN),
        ..AccessOptions::default()
    });
    assert_eq!(
        with(&access, Role::Reader, "Bearer of-another-service"),
        Ok(None)
    );
    assert_eq!(outcome(&access, Role::Reader, &[]), Ok(None));
}

#[test]
fn loopback_refuses_pages_of_other_origins() {
    let access = access(AccessOptions {
        loopback: true,
        ..AccessOptions::default()
    });
    let check = |pairs: &[_]| outcome(&access, Role::Admin, pairs);
    let local = (header::HOST, "127.0.0.1:8080");
    assert_eq!(check(std::slice::from_ref(&local)), Ok(None));
    let evil = (header::HOST, "evil.example:8080");
    assert_eq!(check(&[evil]), Err(Problem::Forbidden));
    let other_page = (header::ORIGIN, "http://localhost:3000");
    assert_eq!(check(&[local, other_page]), Err(Problem::Forbidden));
}

#[test]
fn a_loopback_address_is_read_without_a_token_under_its_own_and_allowed_names() {
    let with_readers = |readers| {
        access(AccessOptions {
            readers,
            loopback: true,
            allowed_hosts: vec!["models.example".to_owned()],
            ..AccessOptions::default()
        })
    };
    let open = with_readers(None);
    let check = |access: &Access, host| outcome(access, Role::Reader, &[(header::HOST, host)]);
    for host in ["localhost:8080", "models.example"] {
        assert_eq!(check(&open, host), Ok(None), "{host}");
    }
    assert_eq!(check(&open, "evil.example"), Err(Problem::Forbidden));
    // A token can't be sent by a page that does not know it: then any name will do.
    let closed = with_readers(tokens(&format!("ray:{READER}")));
    let bearer = format!("Bearer {READER}");
    let named = [
        (header::HOST, "any.example"),
        (header::AUTHORIZATION, &*bearer),
    ];
    assert_eq!(
        outcome(&closed, Role::Reader, &named),
        Ok(Some("ray".to_owned()))
    );
}

#[test]
fn a_reader_who_tries_to_change_something_is_known_by_name() {
    let bearer = format!("Bearer {READER}");
    let headers = headers(&[(header::AUTHORIZATION, &bearer)]);
    let (caller, outcome) = admit(&both(), Role::Admin, &headers);
    assert_eq!(
        outcome.map_err(|error| error.problem()),
        Err(Problem::Forbidden)
    );
    assert_eq!(caller.actor(Role::Admin).name(), "ray");
}

#[test]
fn closed_is_closed() {
    let access = access(AccessOptions::default());
    assert_eq!(outcome(&access, Role::Admin, &[]), Err(Problem::Forbidden));
}

#[tokio::test(start_paused = true)]
async fn an_address_may_not_guess_for_ever_and_holds_nobody_up() {
    let access = both();
    let guess = |token: &str| with(&access, Role::Admin, &format!("Bearer {token}"));
    let refused =
        (0..100).filter(|number| guess(&format!("guess-{number}")) == Err(Problem::RateLimited));
    assert_eq!(refused.count(), 70);
    assert_eq!(guess(ADMIN), Ok(Some("ada".to_owned())));
    tokio::time::advance(Duration::from_secs(60)).await;
    assert_eq!(guess("again"), Err(Problem::Unauthorized));
}

#[tokio::test(start_paused = true)]
async fn each_token_has_a_rate_and_may_have_its_own() {
    let access = access(AccessOptions {
        readers: tokens(&format!("slow:{READER} rate=1/m\nfast:{ADMIN}")),
        rate_limit: "3/m".parse().ok(),
        ..AccessOptions::default()
    });
    let taken = |token: &str| {
        let bearer = format!("Bearer {token}");
        let headers = headers(&[(header::AUTHORIZATION, &bearer)]);
        let (caller, outcome) = admit(&access, Role::Reader, &headers);
        outcome.expect("a right token");
        let tries = (0..10).filter(|_| access.count(&caller, None).is_ok());
        tries.count()
    };
    assert_eq!((taken(READER), taken(ADMIN)), (1, 3));
}

#[tokio::test]
async fn an_act_whose_client_leaves_is_written_down() {
    let log = tempfile::NamedTempFile::new().expect("a file");
    let file = log.reopen().expect("the file");
    let subscriber = tracing_subscriber::fmt().with_writer(Arc::new(file));
    let _default = tracing::subscriber::set_default(subscriber.finish());
    let gate = Gate {
        access: both(),
        role: Role::Admin,
    };
    let begun = Arc::new(Notify::new());
    let handler = {
        let begun = Arc::clone(&begun);
        move || async move {
            begun.notify_one();
            pending::<()>().await;
        }
    };
    let router = Router::new()
        .route("/admin/act", post(handler))
        .layer(from_fn_with_state(gate, guard));
    let request = axum::http::Request::post("/admin/act")
        .header(header::AUTHORIZATION, format!("Bearer {ADMIN}"))
        .body(Body::empty());
    let answer = router.oneshot(request.expect("a request"));
    // hyper drops the answer when the client closes the connection.
    tokio::select! {
        _ = answer => unreachable!("the handler never ends"),
        () = begun.notified() => {}
    }
    let log = std::fs::read_to_string(log.path()).expect("the log");
    assert!(
        log.contains("ada") && log.contains("/admin/act") && log.contains("unanswered"),
        "{log}"
    );
}
