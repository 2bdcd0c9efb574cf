//! Files of model folders: JSON and safetensors in and out, and folders that appear whole or not
//! at all.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::AdapterError;
use super::folder::REPORT;
use crate::files::{self, MAX_JSON_BYTES};
use crate::lfs::refuse_pointer;
use crate::ops::is_finite;
use crate::parse;

/// Largest file of an adapter's weights: as much as all of a base-size encoder has in f32. Reading it
/// takes three times as much memory.
const MAX_WEIGHTS_BYTES: u64 = 512 << 20;

/// Most tensors of an adapter. A large encoder with LoRA on all linears needs a thousand.
const MAX_TENSORS: usize = 4_096;

/// Largest report. Clients that may only read are answered with it.
const MAX_REPORT_BYTES: u64 = 1 << 20;

/// Fills a folder so that a crash at any byte leaves either all of it or nothing at `dir`.
///
/// `fill` gets a temporary folder beside `dir`; its files are flushed to the disk before the folder
/// is renamed into place. A folder with files in it is never replaced.
pub fn write_folder<E: From<AdapterError>>(
    dir: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).map_err(AdapterError::io("create", parent))?;
    let temporary = temporary_folder(parent).map_err(AdapterError::io("write into", parent))?;
    fill(temporary.path())?;
    sync_tree(temporary.path())?;
    fs::rename(temporary.path(), dir).map_err(|source| match source.kind() {
        ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists => {
            AdapterError::Exists(dir.to_path_buf())
        }
        _ => AdapterError::io("create", dir)(source),
    })?;
    // It is in its place: nothing is left to remove.
    let _ = temporary.keep();
    sync(parent)?;
    Ok(())
}

fn temporary_folder(parent: &Path) -> std::io::Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".tmp-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // The umask applies, as for any other folder; the default would be private to this user.
        builder.permissions(fs::Permissions::from_mode(0o777));
    }
    builder.tempdir_in(parent)
}

fn sync_tree(dir: &Path) -> Result<(), AdapterError> {
    for entry in fs::read_dir(dir).map_err(AdapterError::io("read", dir))? {
        let path = entry.map_err(AdapterError::io("read", dir))?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            sync(&path)?;
        }
    }
    sync(dir)
}

fn sync(path: &Path) -> Result<(), AdapterError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(AdapterError::io("flush", path))
}

pub(super) fn read_json<T: DeserializeOwned>(
    path: &Path,
    hint: &'static str,
) -> Result<T, AdapterError> {
    let bytes = read(path, MAX_JSON_BYTES, hint)?;
    parse::json(&bytes).map_err(|source| AdapterError::Json {
        path: path.to_path_buf(),
        source,
    })
}

pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), AdapterError> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|error| AdapterError::io("write", path)(error.into()))?;
    text.push(b'\n');
    let mut file = File::create(path).map_err(AdapterError::io("create", path))?;
    file.write_all(&text)
        .map_err(AdapterError::io("write", path))
}

/// Reads `report.json` of a version's folder; `None` if there is none.
///
/// # Errors
/// It is not an object of JSON that can be read back, or too large.
pub fn read_report(dir: &Path) -> Result<Option<Value>, AdapterError> {
    let path = dir.join(REPORT);
    match read(&path, MAX_REPORT_BYTES, "") {
        Err(AdapterError::MissingFile { .. }) => Ok(None),
        bytes => match parse::json(&bytes?) {
            Ok(report) => Ok(Some(Value::Object(report))),
            Err(source) => Err(AdapterError::Json { path, source }),
        },
    }
}

fn read(path: &Path, limit: u64, hint: &'static str) -> Result<Vec<u8>, AdapterError> {
    let bytes = files::read(path, limit).map_err(|source| match source.kind() {
        ErrorKind::NotFound => AdapterError::MissingFile {
            path: path.to_path_buf(),
            hint,
        },
        _ => AdapterError::io("read", path)(source),
    })?;
    refuse_pointer(path, &bytes)?;
    Ok(bytes)
}

/// The tensors of a safetensors file whose names `wanted` takes, on the CPU in f32.
///
/// Half precision is widened; integers, 8-bit floats and values that are not finite are refused.
pub(super) fn read_tensors(
    path: &Path,
    hint: &'static str,
    wanted: impl Fn(&str) -> bool,
) -> Result<BTreeMap<String, Tensor>, AdapterError> {
    let bytes = read(path, MAX_WEIGHTS_BYTES, hint)?;
    let file = SafeTensors::deserialize(&bytes).map_err(|source| AdapterError::SafeTensors {
        path: path.to_path_buf(),
        source,
    })?;
    if file.len() > MAX_TENSORS {
        let problem = format!(
            "has {} tensors; at most {MAX_TENSORS} are supported",
            file.len()
        );
        return Err(AdapterError::config(path, problem));
    }
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter().filter(|(name, _)| wanted(name)) {
        if !matches!(
            view.dtype(),
            Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64
        ) {
            return Err(AdapterError::tensor(
                name,
                format!(
                    "numbers of type {:?} are not supported; f32, f16 and bf16 are",
                    view.dtype()
                ),
            ));
        }
        let tensor = candle_core::safetensors::Load::load(&view, &Device::Cpu)?;
        let tensor = tensor.to_dtype(DType::F32)?;
        if !is_finite(&tensor)? {
            return Err(AdapterError::tensor(
                name,
                "holds values that are not finite (NaN or infinity)",
            ));
        }
        tensors.insert(name.to_owned(), tensor);
    }
    Ok(tensors)
}

/// The number formats in a safetensors file.
pub(super) fn stored_types(path: &Path) -> Result<BTreeSet<String>, AdapterError> {
    let hint = "it holds the weights of the adapter";
    let bytes = read(path, MAX_WEIGHTS_BYTES, hint)?;
    let file = SafeTensors::deserialize(&bytes).map_err(|source| AdapterError::SafeTensors {
        path: path.to_path_buf(),
        source,
    })?;
    let name = |(_, view): (&str, safetensors::tensor::TensorView<'_>)| {
        format!("{:?}", view.dtype()).to_lowercase()
    };
    Ok(file.iter().map(name).collect())
}

/// Writes tensors in one number format, with the metadata that `transformers` asks for.
pub(super) fn write_tensors(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    dtype: DType,
) -> Result<(), AdapterError> {
    let mut plain = BTreeMap::new();
    for (name, tensor) in tensors {
        let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(dtype)?;
        plain.insert(name, tensor.contiguous()?);
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let bytes = safetensors::serialize(plain, Some(metadata)).map_err(|source| {
        AdapterError::SafeTensors {
            path: path.to_path_buf(),
            source,
        }
    })?;
    fs::write(path, bytes).map_err(AdapterError::io("write", path))
}

/// Copies those of `names` that exist in `from`.
pub(super) fn copy_existing(from: &Path, to: &Path, names: &[&str]) -> Result<(), AdapterError> {
    for name in names {
        let source: PathBuf = from.join(name);
        if source.is_file() {
            fs::copy(&source, to.join(name)).map_err(AdapterError::io("copy", &source))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_cannot_be_filled_leaves_nothing_behind() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("adapter");
        let result = write_folder(&dir, |temporary| {
            fs::write(temporary.join("a"), "half").unwrap();
            Err(AdapterError::NoLora)
        });
        assert!(matches!(result, Err(AdapterError::NoLora)));
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_with_files_is_not_replaced() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("adapter");
        let fill = |text: &'static str| {
            move |temporary: &Path| {
                fs::write(temporary.join("a"), text).map_err(AdapterError::io("write", temporary))
            }
        };
        write_folder(&dir, fill("first")).unwrap();
        let result = write_folder(&dir, fill("second"));
        assert!(matches!(result, Err(AdapterError::Exists(_))));
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "first");
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_empty_folder_is_filled() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("adapter");
        fs::create_dir(&dir).unwrap();
        write_folder(&dir, |temporary| {
            fs::write(temporary.join("a"), "whole").map_err(AdapterError::io("write", temporary))
        })
        .unwrap();
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "whole");
    }

    #[test]
    fn half_precision_is_widened() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("half.safetensors");
        let tensor = Tensor::new(&[0.5f32, -2.0], &Device::Cpu).unwrap();
        for dtype in [DType::F16, DType::BF16] {
            let half = HashMap::from([("x", tensor.to_dtype(dtype).unwrap())]);
            candle_core::safetensors::save(&half, &path).unwrap();
            let read = read_tensors(&path, "", |_| true).unwrap();
            assert_eq!(read["x"].dtype(), DType::F32);
            assert_eq!(read["x"].to_vec1::<f32>().unwrap(), [0.5, -2.0]);
        }
    }

    #[test]
    fn values_that_are_not_finite_are_refused_by_name() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("nan.safetensors");
        let tensor = Tensor::new(&[0.5f32, f32::NAN], &Device::Cpu).unwrap();
        write_tensors(
            &path,
            &BTreeMap::from([("x".to_owned(), tensor)]),
            DType::F32,
        )
        .unwrap();
        let error = read_tensors(&path, "", |_| true).unwrap_err();
        assert!(matches!(error, AdapterError::Tensor { name, .. } if name == "x"));
    }

    #[test]
    fn a_cut_file_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("cut.safetensors");
        let tensor = Tensor::new(&[0.5f32, 1.0], &Device::Cpu).unwrap();
        write_tensors(
            &path,
            &BTreeMap::from([("x".to_owned(), tensor)]),
            DType::F32,
        )
        .unwrap();
        let bytes = fs::read(&path).unwrap();
        for length in [0, 4, 20, bytes.len() - 1] {
            fs::write(&path, &bytes[..length]).unwrap();
            let error = read_tensors(&path, "", |_| true).unwrap_err();
            assert!(matches!(error, AdapterError::SafeTensors { .. }));
        }
    }
}
