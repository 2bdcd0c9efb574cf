//! serde's messages in the words of JSON: no names of Rust types, and values of any length.

/// Longest message, in characters: values and names of fields come from whoever wrote the text.
const MAX_MESSAGE: usize = 600;
/// Longest value that is quoted.
const MAX_VALUE: usize = 80;

/// The message for the field at `path`, `.` for the whole document.
pub(super) fn sentence(path: &str, message: &str) -> String {
    let problem = translated(message);
    match path {
        "." => shortened(&problem, MAX_MESSAGE),
        path => format!(
            "{}: {}",
            shortened(path, MAX_MESSAGE),
            shortened(&problem, MAX_MESSAGE)
        ),
    }
}

fn translated(message: &str) -> String {
    let split = |prefix| message.strip_prefix(prefix)?.rsplit_once(", expected ");
    if let Some((value, kind)) = split("invalid type: ") {
        return format!("expected {}, got {}", expected(kind), got(value));
    }
    if let Some((value, kind)) = split("invalid value: ") {
        let kind = range(kind).unwrap_or_else(|| expected(kind).to_owned());
        return format!("expected {kind}, got {}", got(value));
    }
    if let Some((length, kind)) = split("invalid length ") {
        return format!("expected {}, got a list of {length}", expected(kind));
    }
    if let Some((name, names)) = split("unknown variant ") {
        let name = name.trim_matches('`');
        return format!("expected {names}, got \"{}\"", shortened(name, MAX_VALUE));
    }
    if let Some((name, names)) = split("unknown field ") {
        let name = name.trim_matches('`');
        let name = shortened(name, MAX_VALUE);
        return format!("unknown field `{name}`, expected {names}");
    }
    message.to_owned()
}

/// What serde's visitors call the kind that they take.
fn expected(kind: &str) -> &str {
    match kind {
        "i8" | "i16" | "i32" | "i64" | "isize" | "u8" | "u16" | "u32" | "u64" | "usize" => {
            "a whole number"
        }
        "f32" | "f64" => "a number",
        "a boolean" => "true or false",
        "path string" => "a string",
        "a sequence" => "a list",
        "a map" | "newtype variant" | "struct variant" => "an object",
        "unit" | "unit variant" => "a name",
        "enum" => "an object with one field",
        "a tuple of size 2" => "a list of 2",
        kind => kind,
    }
}

/// The range of whole numbers of a Rust type.
fn range(kind: &str) -> Option<String> {
    macro_rules! ranges {
        ($($kind:ident)+) => {
            match kind {
                $(stringify!($kind) => {
                    Some(format!("a whole number from {} to {}", $kind::MIN, $kind::MAX))
                })+
                _ => None,
            }
        };
    }
    ranges!(i8 i16 i32 i64 isize u8 u16 u32 u64 usize)
}

/// What serde calls the value that came.
fn got(value: &str) -> String {
    let plain = ["integer ", "floating point ", "boolean "]
        .into_iter()
        .find_map(|kind| value.strip_prefix(kind));
    match value {
        "sequence" => "a list".to_owned(),
        "map" => "an object".to_owned(),
        "null" | "unit value" | "Option value" => "null".to_owned(),
        "unit variant" => "a name alone".to_owned(),
        value => {
            let value = plain.map_or(value, |plain| plain.trim_matches('`'));
            let value = value.strip_prefix("string ").unwrap_or(value);
            shortened(value, MAX_VALUE)
        }
    }
}

fn shortened(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
