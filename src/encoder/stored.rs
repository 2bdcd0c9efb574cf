//! Tensors as a model folder stores them: in one safetensors file, or in several (shards) that an
//! index names.

#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::Deserialize;

use super::EncoderError;
use crate::files::{self, MAX_JSON_BYTES};
use crate::lfs::refuse_pointer;
use crate::parse;

/// The file of a model's weights.
pub const WEIGHTS: &str = "model.safetensors";
/// The file that names the shards, where the weights are in several files.
pub const WEIGHTS_INDEX: &str = "model.safetensors.index.json";
/// Weights as Python objects, in one file or in shards.
const PICKLES: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];

/// Length of the number at the start of a file, which is the length of its header.
const LENGTH_BYTES: usize = 8;
/// Longest header that is read. Real ones have a few hundred bytes a tensor.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes that tell a Git LFS pointer.
const BEGINNING_BYTES: u64 = 64;

/// The tensors of a model, of which only names, types and shapes are in memory. How they are shared
/// out over files makes no difference.
#[derive(Debug)]
pub struct StoredTensors {
    files: Vec<TensorFile>,
    /// Position in `files` of the file that holds a tensor.
    places: BTreeMap<String, usize>,
}

/// A tensor as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// The elements in row-major order, little-endian.
    pub bytes: Vec<u8>,
}

/// One safetensors file.
#[derive(Debug)]
struct TensorFile {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    /// Offset of the first tensor's bytes.
    start: u64,
}

/// The part of an index that is needed.
#[derive(Deserialize)]
struct Index {
    /// File name of each tensor's shard.
    weight_map: BTreeMap<String, String>,
}

/// Returns the files that hold the weights of a model folder: `model.safetensors`, or the index and
/// the shards that it names.
///
/// # Errors
/// The folder has neither, or the index or one of its shards cannot be used.
pub fn weight_files(dir: &Path) -> Result<Vec<PathBuf>, EncoderError> {
    let whole = dir.join(WEIGHTS);
    if whole.is_file() {
        return Ok(vec![whole]);
    }
    let index = dir.join(WEIGHTS_INDEX);
    if !index.is_file() {
        let pickle = PICKLES.iter().find(|name| dir.join(name).exists());
        return Err(match pickle {
            Some(name) => EncoderError::Pickle {
                path: dir.join(name),
            },
            None => EncoderError::NoWeights {
                folder: dir.to_path_buf(),
            },
        });
    }
    let mut files = vec![index.clone()];
    for shard in shard_names(&index)? {
        let path = dir.join(&shard);
        if !path.is_file() {
            return Err(bad_index(&index, format!("the shard {shard} is missing")));
        }
        files.push(path);
    }
    Ok(files)
}

/// Returns the size of a model folder's weights on disk, 0 if it has none.
pub fn weight_bytes(dir: &Path) -> u64 {
    let files = weight_files(dir).unwrap_or_default();
    let sizes = files.iter().filter_map(|path| path.metadata().ok());
    sizes.map(|metadata| metadata.len()).sum()
}

/// Returns the file names of the shards that an index names. They are plain names: a shard lies
/// beside its index.
pub fn shard_names(index: &Path) -> Result<BTreeSet<String>, EncoderError> {
    Ok(read_index(index)?.weight_map.into_values().collect())
}

fn read_index(path: &Path) -> Result<Index, EncoderError> {
    let bytes = files::read(path, MAX_JSON_BYTES).map_err(|source| EncoderError::Read {
        path: path.to_path_buf(),
        source,
    })?;
    refuse_pointer(path, &bytes)?;
    let index: Index = parse::json(&bytes).map_err(|error| bad_index(path, error.to_string()))?;
    let is_plain = |name: &String| {
        let mut parts = Path::new(name).components();
        matches!(parts.next(), Some(Component::Normal(only)) if only == name.as_str())
            && parts.next().is_none()
    };
    match index.weight_map.values().find(|name| !is_plain(name)) {
        Some(name) => Err(bad_index(
            path,
            format!("the shard {name:?} is not a file name; shards must lie beside their index"),
        )),
        None => Ok(index),
    }
}

fn bad_index(path: &Path, problem: String) -> EncoderError {
    EncoderError::Index {
        path: path.to_path_buf(),
        problem,
    }
}

impl StoredTensors {
    /// Opens the weights of a model folder.
    ///
    /// # Errors
    /// A file is missing or damaged, or the index does not list exactly what the shards hold.
    pub fn open(dir: &Path) -> Result<Self, EncoderError> {
        let paths = weight_files(dir)?;
        let index = dir.join(WEIGHTS_INDEX);
        let Some((_, shards)) = paths.split_first().filter(|(first, _)| **first == index) else {
            return Self::of_files(paths);
        };
        let stored = Self::of_files(shards.to_vec())?;
        let listed = read_index(&index)?.weight_map;
        for (name, shard) in &listed {
            if stored
                .file_of(name)
                .is_none_or(|file| file.name() != *shard)
            {
                let problem = format!("{shard} does not hold the tensor {name}");
                return Err(bad_index(&index, problem));
            }
        }
        if let Some(name) = stored.names().find(|name| !listed.contains_key(*name)) {
            let problem = format!("it does not list the tensor {name}, which a shard holds");
            return Err(bad_index(&index, problem));
        }
        Ok(stored)
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    /// The file can't be read, or is not as long as its header says.
    pub fn of_file(path: PathBuf) -> Result<Self, EncoderError> {
        Self::of_files(vec![path])
    }

    fn of_files(paths: Vec<PathBuf>) -> Result<Self, EncoderError> {
        let mut stored = Self {
            files: Vec::with_capacity(paths.len()),
            places: BTreeMap::new(),
        };
        for path in paths {
            let file = TensorFile::open(path)?;
            for name in file.metadata.offset_keys() {
                if let Some(other) = stored.file_of(&name) {
                    let (path, other) = (file.path.display(), other.name());
                    let text = format!("{path} and {other} both hold the tensor {name}");
                    return Err(EncoderError::Unsupported(text));
                }
                stored.places.insert(name, stored.files.len());
            }
            stored.files.push(file);
        }
        Ok(stored)
    }

    /// Returns the free-form fields in the header of the (first) file.
    pub fn header(&self) -> Option<&HashMap<String, String>> {
        self.files.first()?.metadata.metadata().as_ref()
    }

    /// Returns the type and shape of each tensor by its name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        let info = |(name, place): (&'_ String, &usize)| self.files[*place].metadata.info(name);
        self.places
            .iter()
            .filter_map(move |entry| Some((entry.0.as_str(), info(entry)?)))
    }

    /// Returns the names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Returns the number of elements of all tensors together.
    pub fn elements(&self) -> u64 {
        let infos = self.names().filter_map(|name| {
            let (_, info) = self.find(name).ok()?;
            Some(info)
        });
        let sizes = infos.map(|info| info.shape.iter().map(|size| *size as u64).product::<u64>());
        sizes.sum()
    }

    /// Reads a tensor as it is stored.
    ///
    /// # Errors
    /// There is no tensor of that name, or its file can't be read.
    pub fn raw(&self, name: &str) -> Result<RawTensor, EncoderError> {
        let (file, info) = self.find(name)?;
        Ok(RawTensor {
            dtype: info.dtype,
            shape: info.shape.clone(),
            bytes: file.bytes(info)?,
        })
    }

    /// Reads a tensor as f32.
    ///
    /// # Errors
    /// There is no tensor of that name, its file can't be read, or its type is not supported.
    pub fn read(&self, name: &str, device: &Device) -> Result<Tensor, EncoderError> {
        let (file, info) = self.find(name)?;
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::F64 => DType::F64,
            Dtype::I64 => DType::I64,
            Dtype::U32 => DType::U32,
            Dtype::U8 => DType::U8,
            other => {
                let text = format!(
                    "{}: the tensor {name} is of type {other:?}, which is not supported",
                    file.path.display()
                );
                return Err(EncoderError::Unsupported(text));
            }
        };
        let tensor = Tensor::from_raw_buffer(&file.bytes(info)?, dtype, &info.shape, device)?;
        Ok(tensor.to_dtype(DType::F32)?)
    }

    fn file_of(&self, name: &str) -> Option<&TensorFile> {
        self.files.get(*self.places.get(name)?)
    }

    fn find(&self, name: &str) -> Result<(&TensorFile, &TensorInfo), EncoderError> {
        self.file_of(name)
            .and_then(|file| Some((file, file.metadata.info(name)?)))
            .ok_or_else(|| EncoderError::MissingWeight { name: name.into() })
    }
}

impl TensorFile {
    fn open(path: PathBuf) -> Result<Self, EncoderError> {
        let read = |source| EncoderError::Read {
            path: path.clone(),
            source,
        };
        let file = files::open(&path, u64::MAX).map_err(read)?;
        let mut beginning = Vec::new();
        (&file)
            .take(BEGINNING_BYTES)
            .read_to_end(&mut beginning)
            .map_err(read)?;
        refuse_pointer(&path, &beginning)?;
        let length = beginning
            .first_chunk::<LENGTH_BYTES>()
            .ok_or_else(|| read(ErrorKind::UnexpectedEof.into()))?;
        let length = u64::from_le_bytes(*length);
        let whole = file.metadata().map_err(read)?.len();
        if length > MAX_HEADER_BYTES.min(whole) {
            let text = format!("{} is not a safetensors file", path.display());
            return Err(EncoderError::Unsupported(text));
        }
        let mut header = vec![0u8; length as usize];
        file.read_exact_at(&mut header, LENGTH_BYTES as u64)
            .map_err(read)?;
        let metadata: Metadata = parse::json(&header).map_err(|source| EncoderError::Config {
            path: path.clone(),
            source,
        })?;
        let start = LENGTH_BYTES as u64 + length;
        let described = start.saturating_add(metadata.data_len() as u64);
        if described != whole {
            let text = format!(
                "{} is cut short or too long: its header describes {described} bytes, it has \
                 {whole}",
                path.display()
            );
            return Err(EncoderError::Unsupported(text));
        }
        Ok(Self {
            start,
            path,
            file,
            metadata,
        })
    }

    /// The name of the file without its folder.
    fn name(&self) -> String {
        let name = self.path.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    fn bytes(&self, info: &TensorInfo) -> Result<Vec<u8>, EncoderError> {
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0u8; end.saturating_sub(start)];
        self.file
            .read_exact_at(&mut bytes, self.start + start as u64)
            .map_err(|source| EncoderError::Read {
                path: self.path.clone(),
                source,
            })?;
        Ok(bytes)
    }
}
