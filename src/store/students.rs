//! Which student each version was trained on, and which one the state folder is served with.

use std::path::{Path, PathBuf};

use sqlx::Row as _;

use super::artifacts;
use super::versions::{Version, artifact, database_int, unsigned};
use super::{Store, StoreError};
use crate::adapter::{AdapterBase, FileSums, KnownEncoders};
use crate::encoder::EncoderId;
use crate::telemetry::chain;

/// Name of the setting that holds the student.
const STUDENT: &str = "student";

/// A version of which something is not recorded.
struct Unsettled {
    task: String,
    version: u64,
    path: PathBuf,
    digest: String,
    has_files: bool,
}

/// What a version's folder says.
struct Found {
    task: String,
    version: u64,
    base: AdapterBase,
    /// Absent if they are recorded already.
    files: Option<FileSums>,
}

impl Store {
    /// The student that the state folder was last served with, as a name or folder.
    pub async fn student(&self) -> Result<Option<String>, StoreError> {
        let sql = "SELECT value FROM settings WHERE name = ?";
        Ok(sqlx::query_scalar(sql)
            .bind(STUDENT)
            .fetch_optional(self.pool())
            .await?)
    }

    /// Remembers the student that the state folder is served with.
    pub async fn set_student(&self, student: &str) -> Result<(), StoreError> {
        self.write(async |connection| {
            sqlx::query("INSERT OR REPLACE INTO settings (name, value) VALUES (?, ?)")
                .bind(STUDENT)
                .bind(student)
                .execute(connection)
                .await?;
            Ok(())
        })
        .await
    }

    /// Records what versions of earlier releases lack: the student that their files name, and the
    /// sums of their files.
    ///
    /// A name that `known` has no digest for leaves the version without one. A version whose files
    /// are not what was stored is logged and left as it is.
    pub async fn settle_versions(&self, known: &KnownEncoders) -> Result<(), StoreError> {
        let sql = "SELECT task, version, digest, files IS NOT NULL AS has_files FROM versions
            WHERE files IS NULL OR student_digest IS NULL";
        let rows = sqlx::query(sql).fetch_all(self.pool()).await?;
        let mut unsettled = Vec::with_capacity(rows.len());
        for row in rows {
            let task: String = row.try_get("task")?;
            let version = unsigned(&row, "version")?;
            unsettled.push(Unsettled {
                path: artifact(&self.artifacts(), &task, version),
                digest: row.try_get("digest")?,
                has_files: row.try_get("has_files")?,
                version,
                task,
            });
        }
        if unsettled.is_empty() {
            return Ok(());
        }
        let known = known.clone();
        let read = move || {
            let found = unsettled.into_iter();
            found.filter_map(|version| version.read(&known)).collect()
        };
        let found: Vec<Found> = tokio::task::spawn_blocking(read).await?;
        self.write(async |connection| {
            for found in found {
                let sql = "UPDATE versions SET files = COALESCE(files, ?1),
                    student_name = COALESCE(student_name, ?2),
                    student_digest = COALESCE(student_digest, ?3)
                    WHERE task = ?4 AND version = ?5";
                sqlx::query(sql)
                    .bind(found.files.map(|files| files.to_json()))
                    .bind(found.base.name)
                    .bind(found.base.digest)
                    .bind(found.task)
                    .bind(database_int(found.version))
                    .execute(&mut *connection)
                    .await?;
            }
            Ok(())
        })
        .await
    }

    /// Records the student of a version that has none, because an administrator says so.
    ///
    /// # Errors
    /// The version has a student.
    pub async fn adopt(
        &self,
        task: &str,
        version: u64,
        student: &EncoderId,
    ) -> Result<Version, StoreError> {
        let adopted = self.version(task, version).await?;
        if adopted.base.digest.is_some() {
            return Err(StoreError::HasStudent {
                task: adopted.task,
                version,
                student: adopted.base.to_string(),
            });
        }
        self.write(async |connection| {
            let sql = "UPDATE versions SET student_name = ?, student_digest = ?
                WHERE task = ? AND version = ? AND student_digest IS NULL";
            sqlx::query(sql)
                .bind(&student.name)
                .bind(&student.digest)
                .bind(task)
                .bind(database_int(version))
                .execute(connection)
                .await?;
            Ok(())
        })
        .await?;
        self.version(task, version).await
    }
}

impl Unsettled {
    /// Reads the version's folder; `None` if there is nothing to record.
    fn read(self, known: &KnownEncoders) -> Option<Found> {
        let Self {
            task,
            version,
            path,
            digest,
            has_files,
        } = self;
        let files = match has_files {
            true => None,
            false => Some(stored_sums(&path, &digest).unwrap_or_else(|problem| {
                tracing::error!(
                    task,
                    version,
                    problem,
                    "the files of a version can't be used"
                );
                None
            })?),
        };
        let base = AdapterBase::read(&path, known).unwrap_or_else(|error| {
            let error = chain(&error);
            tracing::warn!(
                task,
                version,
                error,
                "the student of a version is not known"
            );
            AdapterBase::default()
        });
        Some(Found {
            task,
            version,
            base,
            files,
        })
    }
}

/// The sums of a folder that must have a digest; none of one that is gone, which recovery has said.
fn stored_sums(folder: &Path, digest: &str) -> Result<Option<FileSums>, String> {
    if !folder.is_dir() {
        return Ok(None);
    }
    match artifacts::contents(folder) {
        Ok(contents) if contents.digest == digest => Ok(Some(contents.files)),
        Ok(_) => Err("they are not what was stored; restore them from a backup".to_owned()),
        Err(error) => Err(chain(&error)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::Origin;
    use super::super::testing::{adapter, store};
    use super::*;
    use crate::adapter::KnownEncoder;

    fn known() -> KnownEncoders {
        KnownEncoders::new([KnownEncoder {
            names: vec!["small".to_owned()],
            digest: Some("aa".to_owned()),
        }])
    }

    fn id(name: &str, digest: &str) -> EncoderId {
        EncoderId {
            name: name.to_owned(),
            digest: digest.to_owned(),
        }
    }

    /// Takes away what an earlier release has not recorded.
    async fn forget(store: &Store) {
        let sql = "UPDATE versions SET files = NULL, student_name = NULL, student_digest = NULL";
        sqlx::query(sql).execute(store.pool()).await.unwrap();
    }

    fn write_config(folder: &Path, base: &str) {
        let config = serde_json::json!({"peft_type": "LORA", "r": 2, "lora_alpha": 2,
            "target_modules": ["query"], "base_model_name_or_path": base});
        fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    }

    #[tokio::test]
    async fn versions_of_an_earlier_release_get_what_their_files_say() {
        let (folder, store) = store().await;
        for (version, base) in ["small", "own"].into_iter().enumerate() {
            let source = adapter(&folder, base);
            write_config(&source, base);
            let added = store.add_version("topic", &source, Origin::Imported).await;
            assert_eq!(added.unwrap().version, version as u64 + 1);
        }
        forget(&store).await;
        for _ in 0..2 {
            store.settle_versions(&known()).await.unwrap();
            let versions = store.versions("topic").await.unwrap();
            let bases: Vec<String> = versions.iter().map(|v| v.base.to_string()).collect();
            assert_eq!(bases, ["small (aa)", "own"]);
            for version in versions {
                version.files.verify(&version.path).unwrap();
            }
        }
    }

    #[tokio::test]
    async fn files_that_are_not_what_was_stored_are_never_recorded() {
        let (folder, store) = store().await;
        let source = adapter(&folder, "one");
        let added = store.add_version("topic", &source, Origin::Imported).await;
        let version = added.unwrap();
        version.files.verify(&version.path).unwrap();
        forget(&store).await;
        fs::write(version.path.join("adapter_model.safetensors"), "onf").unwrap();
        store.settle_versions(&known()).await.unwrap();
        let version = store.version("topic", 1).await.unwrap();
        assert!(version.files.verify(&version.path).is_err());
    }

    #[tokio::test]
    async fn a_version_is_adopted_once() {
        let (folder, store) = store().await;
        let source = adapter(&folder, "one");
        store
            .add_version("topic", &source, Origin::Imported)
            .await
            .unwrap();
        let adopted = store.adopt("topic", 1, &id("own", "cc")).await.unwrap();
        assert_eq!(adopted.base.to_string(), "own (cc)");
        let again = store.adopt("topic", 1, &id("small", "aa")).await;
        assert!(
            matches!(again, Err(StoreError::HasStudent { .. })),
            "{again:?}"
        );
        // What an administrator has said stands.
        store.settle_versions(&known()).await.unwrap();
        let version = store.version("topic", 1).await.unwrap();
        assert_eq!(version.base, adopted.base);
    }

    #[tokio::test]
    async fn the_student_of_the_folder_is_remembered() {
        let (folder, store) = store().await;
        assert_eq!(store.student().await.unwrap(), None);
        for student in ["small", "own"] {
            store.set_student(student).await.unwrap();
            assert_eq!(store.student().await.unwrap().as_deref(), Some(student));
        }
        store.close().await;
        drop(store);
        let store = Store::open(folder.path()).await.unwrap();
        assert_eq!(store.student().await.unwrap().as_deref(), Some("own"));
    }
}
