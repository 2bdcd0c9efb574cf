//! The tensors of a safetensors file, one at a time.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, Metadata};

use super::EncoderError;
use crate::parse;

const FILE: &str = "model.safetensors";
/// Bytes of the number that the file begins with, the length of its header.
const LENGTH_BYTES: usize = 8;
/// A header longer than this is none.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// An open safetensors file, of which only the header is in memory.
#[derive(Debug)]
pub struct StoredTensors {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    /// Where the values begin.
    start: u64,
}

impl StoredTensors {
    /// Opens `model.safetensors` of a folder.
    pub(super) fn open(dir: &Path) -> Result<Self, EncoderError> {
        let path = dir.join(FILE);
        if !path.is_file() {
            let pickle = dir.join("pytorch_model.bin");
            if pickle.exists() {
                return Err(EncoderError::Pickle { path: pickle });
            }
            let source = std::io::Error::from(std::io::ErrorKind::NotFound);
            return Err(EncoderError::Read { path, source });
        }
        Self::of_file(path)
    }

    /// Opens a file.
    ///
    /// # Errors
    /// It can't be read, or is not as long as its header says.
    pub fn of_file(path: PathBuf) -> Result<Self, EncoderError> {
        let read = |source| EncoderError::Read {
            path: path.clone(),
            source,
        };
        let file = File::open(&path).map_err(read)?;
        let mut length = [0u8; LENGTH_BYTES];
        file.read_exact_at(&mut length, 0).map_err(read)?;
        let length = u64::from_le_bytes(length);
        let whole = file.metadata().map_err(read)?.len();
        if length > MAX_HEADER_BYTES.min(whole) {
            let text = format!("{} has no header", path.display());
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
        if start + metadata.data_len() as u64 != whole {
            let text = format!("{} is cut short or too long", path.display());
            return Err(EncoderError::Unsupported(text));
        }
        Ok(Self {
            start,
            path,
            file,
            metadata,
        })
    }

    /// The header: what the file holds and says of itself.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The names in the file.
    pub(super) fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// A tensor in f32.
    ///
    /// # Errors
    /// The file has none of that name, or holds it in a format that is not floating-point.
    pub fn read(&self, name: &str, device: &Device) -> Result<Tensor, EncoderError> {
        let info = self
            .metadata
            .info(name)
            .ok_or_else(|| EncoderError::MissingWeight { name: name.into() })?;
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::F64 => DType::F64,
            Dtype::I64 => DType::I64,
            Dtype::U32 => DType::U32,
            Dtype::U8 => DType::U8,
            other => {
                let text = format!("{}: {name} is in {other:?}", self.path.display());
                return Err(EncoderError::Unsupported(text));
            }
        };
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0u8; end.saturating_sub(start)];
        self.file
            .read_exact_at(&mut bytes, self.start + start as u64)
            .map_err(|source| EncoderError::Read {
                path: self.path.clone(),
                source,
            })?;
        let tensor = Tensor::from_raw_buffer(&bytes, dtype, &info.shape, device)?;
        Ok(tensor.to_dtype(DType::F32)?)
    }
}
