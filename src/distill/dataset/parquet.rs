//! Rows of a Parquet file.

use std::fs::File;
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::file::reader::{FileReader as _, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::Type;
use serde_json::{Map, Number, Value};

use super::columns::Columns;

/// Reads a file row by row, the columns that hold fields of a row only.
pub(super) struct ParquetRows {
    reader: SerializedFileReader<File>,
    wanted: Type,
    /// Names of the columns that are not read.
    pub(super) ignored: Vec<String>,
}

impl ParquetRows {
    /// # Errors
    /// The file is not Parquet, or what it holds is larger than `max_bytes` once decompressed; a
    /// sentence for the user.
    pub(super) fn open(file: File, columns: &Columns, max_bytes: u64) -> Result<Self, String> {
        let reader = SerializedFileReader::new(file).map_err(|error| error.to_string())?;
        let groups = reader.metadata().row_groups();
        let columns_of_groups = groups.iter().flat_map(|group| group.columns());
        for column in columns_of_groups {
            let compression = column.compression();
            if !is_built_in(compression) {
                let name = format!("{compression:?}");
                let name = name.split('(').next().unwrap_or_default();
                return Err(format!(
                    "it is compressed with {name}; write it with SNAPPY, GZIP or UNCOMPRESSED"
                ));
            }
        }
        let bytes: u64 = groups
            .iter()
            .map(|group| group.total_byte_size().unsigned_abs())
            .sum();
        if bytes > max_bytes {
            return Err(format!(
                "it holds {bytes} bytes once decompressed; at most {max_bytes} are read"
            ));
        }
        let schema = reader.metadata().file_metadata().schema();
        let mut wanted: Vec<Arc<Type>> = Vec::new();
        let mut ignored = Vec::new();
        for column in schema.get_fields() {
            match columns.field_of(column.name()) {
                Some(_) => wanted.push(Arc::clone(column)),
                None => ignored.push(column.name().to_owned()),
            }
        }
        let wanted = Type::group_type_builder(schema.name())
            .with_fields(wanted)
            .build()
            .map_err(|error| error.to_string())?;
        Ok(Self {
            reader,
            wanted,
            ignored,
        })
    }

    /// Names of the columns that are read.
    pub(super) fn header(&self) -> Vec<&str> {
        let fields = self.wanted.get_fields().iter();
        fields.map(|field| field.name()).collect()
    }

    /// Each row as the object that a line of JSON would be; a row that cannot be read ends the file.
    pub(super) fn rows(&self) -> Result<impl Iterator<Item = Result<Value, String>>, String> {
        let rows = self.reader.get_row_iter(Some(self.wanted.clone()));
        let rows = rows.map_err(|error| error.to_string())?;
        Ok(rows.map(|row| {
            let row = row.map_err(|error| error.to_string())?;
            let fields = row.into_columns().into_iter();
            let fields = fields.map(|(name, field)| (name, json(field)));
            Ok(Value::Object(fields.collect::<Map<_, _>>()))
        }))
    }
}

fn is_built_in(compression: Compression) -> bool {
    matches!(
        compression,
        Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::GZIP(_)
    )
}

/// A value as JSON has it. What no field of a row can be becomes its text.
fn json(field: Field) -> Value {
    let decimal = |value: f64| Number::from_f64(value).map_or(Value::Null, Value::Number);
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => value.into(),
        Field::Byte(value) => value.into(),
        Field::Short(value) => value.into(),
        Field::Int(value) => value.into(),
        Field::Long(value) => value.into(),
        Field::UByte(value) => value.into(),
        Field::UShort(value) => value.into(),
        Field::UInt(value) => value.into(),
        Field::ULong(value) => value.into(),
        Field::Float(value) => decimal(f64::from(value)),
        Field::Double(value) => decimal(value),
        Field::Str(text) => text.into(),
        // A column of texts that its writer did not mark as such.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(_) => Value::Null,
        },
        Field::ListInternal(list) => list.elements().iter().cloned().map(json).collect(),
        other => other.to_string().into(),
    }
}
