//! A moment, to the millisecond.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Serialize, Serializer};
use utoipa::ToSchema;

/// Milliseconds since the Unix epoch; RFC 3339 in JSON (`2026-01-31T12:00:00.000Z`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ToSchema)]
#[schema(value_type = String, format = DateTime)]
pub struct Timestamp(i64);

impl Timestamp {
    pub fn now() -> Self {
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or(Duration::ZERO);
        Self(i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX))
    }

    pub(super) fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    pub(super) fn millis(self) -> i64 {
        self.0
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let millis = Duration::from_millis(self.0.unsigned_abs());
        let text = humantime::format_rfc3339_millis(UNIX_EPOCH + millis);
        serializer.collect_str(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_written_as_rfc_3339() {
        let json = serde_json::to_string(&Timestamp::from_millis(1_500)).unwrap();
        assert_eq!(json, r#""1970-01-01T00:00:01.500Z""#);
    }
}
