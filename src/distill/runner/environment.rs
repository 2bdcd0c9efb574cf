//! Variables of the server that a job's process gets: those that it needs, so that the tokens of
//! the server do not reach it.

use std::env;
use std::ffi::OsString;

use serde_json::Value;

use crate::distill::teacher_http::TOKEN_VARIABLE;
use crate::hub;

/// How programs run on this machine, how downloads get out of it, and settings of `kdlora distill`
/// that are no flags of the server.
const NAMES: &[&str] = &[
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "LANGUAGE",
    "TZ",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "RUST_BACKTRACE",
    "RUST_LIB_BACKTRACE",
    "RAYON_NUM_THREADS",
    "CANDLE_NUM_THREADS",
    "OMP_NUM_THREADS",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "http_proxy",
    "HTTP_PROXY",
    "https_proxy",
    "HTTPS_PROXY",
    "all_proxy",
    "ALL_PROXY",
    "no_proxy",
    "NO_PROXY",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "KDLORA_LOG",
    "KDLORA_LOG_FORMAT",
    "KDLORA_MEMORY_LIMIT",
    "KDLORA_TRAINING_DTYPE",
];

/// Families of variables: locale, pip, the GPU's driver, the allocator.
const PREFIXES: &[&str] = &["LC_", "PIP_", "CUDA_", "NVIDIA_", "_RJEM_", "MALLOC_"];

const HUB_TOKEN: &str = "HF_TOKEN";

/// The variables for a job, of the server's own.
pub(super) fn for_job(spec: &Value) -> Vec<(OsString, OsString)> {
    env::vars_os()
        .filter(|(name, _)| name.to_str().is_some_and(|name| is_needed(name, spec)))
        .collect()
}

fn is_needed(name: &str, spec: &Value) -> bool {
    match name {
        // Only a teacher of the catalog may have to be fetched.
        HUB_TOKEN => {
            let model = spec.pointer("/teacher/model").and_then(Value::as_str);
            // A name may be followed by layers: mpnet-base@0,4,8.
            let name = model.and_then(|model| model.split('@').next());
            name.is_some_and(|name| hub::catalog::find(name).is_some())
        }
        TOKEN_VARIABLE => spec
            .pointer("/teacher/http")
            .is_some_and(|http| !http.is_null()),
        _ => NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_job_gets_no_token_that_it_does_not_need() {
        let plain = json!({"teacher": {"model": "/data/teacher"}});
        let fetched = json!({"teacher": {"model": "mpnet-base"}});
        let of_layers = json!({"teacher": {"model": "mpnet-base@0,4,8"}});
        let asked = json!({"teacher": {"http": {"url": "http://127.0.0.1/"}}});
        let none = json!({"teacher": {"http": null}});
        let gets = |spec: &Value| {
            let names = [
                "KDLORA_ADMIN_TOKENS",
                "KDLORA_API_TOKENS",
                "KDLORA_ADMIN_TOKEN_FILE",
                "AWS_SECRET_ACCESS_KEY",
                HUB_TOKEN,
                TOKEN_VARIABLE,
            ];
            let needed = names.into_iter().filter(|name| is_needed(name, spec));
            needed.collect::<Vec<_>>()
        };
        assert_eq!(gets(&plain), Vec::<&str>::new());
        assert_eq!(gets(&none), Vec::<&str>::new());
        assert_eq!(gets(&fetched), [HUB_TOKEN]);
        assert_eq!(gets(&of_layers), [HUB_TOKEN]);
        assert_eq!(gets(&asked), [TOKEN_VARIABLE]);
        for name in [
            "PATH",
            "HOME",
            "LC_ALL",
            "https_proxy",
            "CUDA_VISIBLE_DEVICES",
        ] {
            assert!(is_needed(name, &plain), "{name}");
        }
    }
}
