use axum::http::HeaderName;

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
    let token = access.admit(role, &headers(pairs), None);
    token
        .map(|token| token.map(|token| token.name.clone()))
        .map_err(|error| error.problem())
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
    for host in [
        "127.0.0.1:8080",
        "localhost:8080",
        "[::1]:8080",
        "127.8.0.1",
    ] {
        assert_eq!(check(&[(header::HOST, host)]), Ok(None), "{host}");
    }
    let evil = (header::HOST, "evil.example:8080");
    assert_eq!(check(&[evil]), Err(Problem::Forbidden));
    let local = (header::HOST, "127.0.0.1:8080");
    let page = |origin| check(&[local.clone(), (header::ORIGIN, origin)]);
    assert_eq!(page("http://localhost:3000"), Ok(None));
    assert_eq!(page("https://evil.example"), Err(Problem::Forbidden));
    assert_eq!(page("null"), Err(Problem::Forbidden));
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
        let token = access
            .admit(Role::Reader, &headers, None)
            .expect("a right token");
        let tries = (0..10).filter(|_| access.count(token.as_deref(), None).is_ok());
        tries.count()
    };
    assert_eq!((taken(READER), taken(ADMIN)), (1, 3));
}
