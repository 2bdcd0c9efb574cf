//! The Hugging Face hub as a source.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Repo, RepoType};

use super::catalog::Repository;
use super::install::Delivery;
use super::{HubError, OPTIONAL, Puller, REQUIRED};
use crate::encoder::{WEIGHTS, WEIGHTS_INDEX, shard_names};

/// Downloads the needed files of a repository into `files`, all of one commit. The weights are
/// those of `model.safetensors` or, where a repository has none, of the shards that an index names.
///
/// The sums of large files are the ones that the hub announces; small files come without.
pub(super) fn fetch(
    puller: &Puller,
    source: &Repository,
    files: &Path,
) -> Result<Delivery, HubError> {
    // Beside the files, so that a downloaded file is moved and not copied.
    let scratch = files.with_file_name("hub");
    let mut remote = Remote::new(puller, RepoType::Model, source, &scratch)?;
    let mut expected = BTreeMap::new();
    let mut download = |file: &str| {
        let etag = remote.download(file, &files.join(file))?;
        if is_sha256(&etag) {
            expected.insert(file.to_owned(), etag);
        }
        Ok(())
    };
    for file in REQUIRED {
        download(file)?;
    }
    for file in OPTIONAL {
        unless_missing(download(file))?;
    }
    let no_weights = || HubError::NoSuchFile {
        file: WEIGHTS.to_owned(),
    };
    if unless_missing(download(WEIGHTS))?.is_none() {
        unless_missing(download(WEIGHTS_INDEX))?.ok_or_else(no_weights)?;
        for shard in shard_names(&files.join(WEIGHTS_INDEX))? {
            download(&shard)?;
        }
    }
    Ok(Delivery {
        source: format!("{}@{}", source.repository, remote.revision),
        expected,
        made_of: None,
        held_to_first: None,
    })
}

/// Turns the error that there is no such file into `None`.
fn unless_missing<T>(outcome: Result<T, HubError>) -> Result<Option<T>, HubError> {
    match outcome {
        Err(HubError::NoSuchFile { .. }) => Ok(None),
        outcome => outcome.map(Some),
    }
}

/// A repository on the hub, of which files are wanted.
pub(super) struct Remote<'a> {
    puller: &'a Puller,
    api: Api,
    kind: RepoType,
    name: String,
    /// Of the catalog, then the commit of the first file, so that all files are of one.
    revision: String,
}

impl<'a> Remote<'a> {
    /// `scratch`: for hf-hub's own layout, on the file system where the files are to be.
    pub(super) fn new(
        puller: &'a Puller,
        kind: RepoType,
        source: &Repository,
        scratch: &Path,
    ) -> Result<Self, HubError> {
        if puller.hub_offline {
            return Err(HubError::HubOffline);
        }
        let api = ApiBuilder::new()
            .with_cache_dir(scratch.to_owned())
            .with_endpoint(puller.endpoint.clone())
            .with_token(puller.token.clone())
            .with_progress(false)
            .with_retries(2)
            .with_user_agent("kdlora", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|error| explain(error, REQUIRED[0], &source.repository))?;
        Ok(Self {
            puller,
            api,
            kind,
            name: source.repository.clone(),
            revision: source.revision.clone(),
        })
    }

    /// Downloads a file to `target`; gives its etag, for large files their SHA-256.
    pub(super) fn download(&mut self, file: &str, target: &Path) -> Result<String, HubError> {
        let repository = Repo::with_revision(self.name.clone(), self.kind, self.revision.clone());
        let download = watch(self.puller, &self.api, repository, file)?;
        self.revision = download.commit;
        fs::rename(&download.blob, target).map_err(HubError::io("move a file to", target))?;
        Ok(download.etag)
    }
}

/// A file in hf-hub's cache layout.
struct Download {
    blob: PathBuf,
    commit: String,
    /// For large files their SHA-256.
    etag: String,
}

enum News {
    Size(u64),
    Bytes(u64),
    End(Result<PathBuf, ApiError>),
}

/// Downloads one file on a thread of its own. hf-hub sets no time-outs: when the thread falls
/// silent it is left behind, to end with its connection.
fn watch(puller: &Puller, api: &Api, repository: Repo, file: &str) -> Result<Download, HubError> {
    let (sender, receiver) = mpsc::channel();
    let remote = api.repo(repository.clone());
    let name = file.to_owned();
    std::thread::Builder::new()
        .name("hub".to_owned())
        .spawn(move || {
            let reporter = Reporter(sender.clone());
            let result = remote.download_with_progress(&name, reporter);
            // Nobody listens any more after a time-out.
            let _ = sender.send(News::End(result));
        })
        .map_err(HubError::io("start a thread for", Path::new(file)))?;
    let pointer = listen(puller, &receiver, file)?
        .map_err(|error| explain(error, file, &repository.url()))?;
    Download::new(&pointer)
}

/// Draws the bar until the end, or until the thread has been silent for too long.
fn listen(
    puller: &Puller,
    news: &Receiver<News>,
    file: &str,
) -> Result<Result<PathBuf, ApiError>, HubError> {
    let mut bar = None;
    loop {
        let patience = match bar {
            None => puller.answer_within,
            Some(_) => puller.stalled_after,
        };
        match news.recv_timeout(patience) {
            Ok(News::Size(bytes)) => bar = Some(puller.progress.bytes(file, bytes)),
            Ok(News::Bytes(bytes)) => {
                if let Some(bar) = &bar {
                    bar.advance(bytes);
                }
            }
            Ok(News::End(result)) => return Ok(result),
            Err(RecvTimeoutError::Timeout) if bar.is_none() => {
                return Err(HubError::HubUnreachable {
                    endpoint: puller.endpoint.clone(),
                    within: patience,
                });
            }
            Err(RecvTimeoutError::Timeout) => {
                return Err(HubError::HubStalled {
                    file: file.to_owned(),
                    after: patience,
                });
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(HubError::HubBroken(file.to_owned()));
            }
        }
    }
}

/// Passes hf-hub's progress on; nobody listens any more after a time-out.
struct Reporter(Sender<News>);

impl hf_hub::api::Progress for Reporter {
    fn init(&mut self, size: usize, _filename: &str) {
        let _ = self.0.send(News::Size(size as u64));
    }

    fn update(&mut self, size: usize) {
        let _ = self.0.send(News::Bytes(size as u64));
    }

    fn finish(&mut self) {}
}

impl Download {
    /// `pointer` is `snapshots/{commit}/{file}`, a link to `blobs/{etag}`. The file may be in a
    /// folder of the repository.
    fn new(pointer: &Path) -> Result<Self, HubError> {
        let blob = pointer
            .canonicalize()
            .map_err(HubError::io("find", pointer))?;
        let name = |path: Option<&Path>| {
            let name = path.and_then(Path::file_name).unwrap_or_default();
            name.to_string_lossy().into_owned()
        };
        let of_commit = pointer
            .ancestors()
            .find(|path| name(path.parent()) == "snapshots");
        Ok(Self {
            commit: name(of_commit),
            etag: name(Some(&blob)),
            blob,
        })
    }
}

fn explain(error: ApiError, file: &str, repository: &str) -> HubError {
    let file = file.to_owned();
    match &error {
        ApiError::RequestError(request) if matches!(**request, ureq::Error::StatusCode(404)) => {
            HubError::NoSuchFile { file }
        }
        _ => HubError::Hub {
            file,
            repository: repository.to_owned(),
            source: Box::new(error),
        },
    }
}

fn is_sha256(etag: &str) -> bool {
    etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_hexdigit())
}
