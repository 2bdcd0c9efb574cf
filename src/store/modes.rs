//! How tasks are to be served, where an administrator has said so.

use super::{Store, StoreError};
use crate::adapter::Mode;

impl Store {
    /// The mode that was asked for, if one was.
    pub async fn mode(&self, task: &str) -> Result<Option<Mode>, StoreError> {
        let sql = "SELECT mode FROM task_modes WHERE task = ?";
        let mode: Option<String> = sqlx::query_scalar(sql)
            .bind(task)
            .fetch_optional(self.pool())
            .await?;
        Ok(mode.and_then(|mode| Mode::parse(&mode)))
    }

    /// Keeps a mode for a task; none leaves it to the server's settings.
    ///
    /// # Errors
    /// There is no such task.
    pub async fn set_mode(&self, task: &str, mode: Option<Mode>) -> Result<(), StoreError> {
        // For its error.
        self.versions(task).await?;
        self.write(async |connection| {
            match mode {
                Some(mode) => {
                    sqlx::query("INSERT OR REPLACE INTO task_modes (task, mode) VALUES (?, ?)")
                        .bind(task)
                        .bind(mode.name())
                        .execute(connection)
                        .await?
                }
                None => {
                    sqlx::query("DELETE FROM task_modes WHERE task = ?")
                        .bind(task)
                        .execute(connection)
                        .await?
                }
            };
            Ok(())
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use crate::store::Origin;

    use super::*;

    #[tokio::test]
    async fn a_mode_is_kept_until_it_is_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let adapter = folder.path().join("adapter");
        std::fs::create_dir(&adapter).unwrap();
        std::fs::write(adapter.join("weights"), "1").unwrap();
        let store = Store::open(&state).await.unwrap();
        let unknown = store.set_mode("mood", Some(Mode::Hot)).await;
        assert!(matches!(unknown, Err(StoreError::UnknownTask(_))));
        store
            .add_version("mood", &adapter, Origin::Imported)
            .await
            .unwrap();
        assert_eq!(store.mode("mood").await.unwrap(), None);
        for mode in [Mode::Merged, Mode::Hot, Mode::Merged] {
            store.set_mode("mood", Some(mode)).await.unwrap();
        }
        store.close().await;
        drop(store);
        let store = Store::open(&state).await.unwrap();
        assert_eq!(store.mode("mood").await.unwrap(), Some(Mode::Merged));
        store.set_mode("mood", None).await.unwrap();
        assert_eq!(store.mode("mood").await.unwrap(), None);
    }
}
