//! Rows of a Parquet file.

use std::fs::File;
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::file::reader::{FileReader as _, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::Type;
use serde_json::{Map, Number, Value};

use super::class_names::ClassColumn;
use super::columns::{Columns, LABEL};

/// The key under which the library `datasets` describes the columns of a file.
const DATASETS_KEY: &str = "huggingface";
/// Greatest size of that description.
const MAX_DESCRIPTION_BYTES: usize = 4 << 20;

/// Reads a file row by row, the columns that hold fields of a row only.
pub(super) struct ParquetRows {
    reader: SerializedFileReader<File>,
    wanted: Type,
    /// Names of the columns that are not read.
    pub(super) ignored: Vec<String>,
    /// The column of the label, if its ids have names.
    pub(super) classes: Option<ClassColumn>,
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
        let mut classes = None;
        for column in schema.get_fields() {
            match columns.field_of(column.name()) {
                Some(field) => {
                    wanted.push(Arc::clone(column));
                    if field == LABEL
                        && let Some(description) = description(&reader)?
                    {
                        classes = ClassColumn::find(description, column.name(), columns)?;
                    }
                }
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
            classes,
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
            let fields = fields.map(|(name, field)| {
                let value = json(field).map_err(|reason| format!("column \"{name}\": {reason}"))?;
                let classes = self.classes.as_ref();
                let value = match classes.filter(|classes| classes.column == name) {
                    Some(classes) => classes.named(value)?,
                    None => value,
                };
                Ok((name, value))
            });
            Ok(Value::Object(
                fields.collect::<Result<Map<_, _>, String>>()?,
            ))
        }))
    }
}

fn is_built_in(compression: Compression) -> bool {
    matches!(
        compression,
        Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::GZIP(_)
    )
}

/// What the library `datasets` says of the columns.
fn description(reader: &SerializedFileReader<File>) -> Result<Option<&str>, String> {
    let pairs = reader.metadata().file_metadata().key_value_metadata();
    let pair = pairs.and_then(|pairs| pairs.iter().find(|pair| pair.key == DATASETS_KEY));
    match pair.and_then(|pair| pair.value.as_deref()) {
        Some(description) if description.len() > MAX_DESCRIPTION_BYTES => Err(format!(
            "its metadata \"{DATASETS_KEY}\" has more than {MAX_DESCRIPTION_BYTES} bytes"
        )),
        description => Ok(description),
    }
}

/// A value as JSON has it. A NaN is a missing value, as for pandas.
fn json(field: Field) -> Result<Value, String> {
    let decimal = |value: f64| match Number::from_f64(value) {
        Some(number) => Value::Number(number),
        None if value.is_nan() => Value::Null,
        None => value.to_string().into(),
    };
    Ok(match field {
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
        Field::Float16(value) => decimal(f64::from(value)),
        Field::Decimal(_) => field.to_string().parse().map_or(Value::Null, decimal),
        Field::Str(text) => text.into(),
        // A column of texts that its writer did not mark as such.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(_) => return Err("it holds bytes that are no UTF-8 text".into()),
        },
        Field::ListInternal(list) => {
            let elements = list.elements().iter().cloned();
            elements.map(json).collect::<Result<_, _>>()?
        }
        // An object stands for a struct or a map, which no field of a row can be.
        Field::Group(_) | Field::MapInternal(_) => Value::Object(Map::new()),
        Field::Date(_)
        | Field::TimeMillis(_)
        | Field::TimeMicros(_)
        | Field::TimestampMillis(_)
        | Field::TimestampMicros(_) => field.to_string().into(),
    })
}
