//! The live task table follows the store: a version is loaded and tried before it answers.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::Mutex;

use super::{Entry, LoadError, Residents, TaskTable};
use crate::adapter::{EncoderIdentity, Fit, Mode};
use crate::store::{LiveVersion, Store, StoreError};
use crate::telemetry::Metrics;

/// Why a version does not answer.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Load(#[from] Arc<LoadError>),
}

/// Brings versions from the store into the task table.
#[derive(Clone)]
pub struct Publisher {
    store: Store,
    tasks: Arc<TaskTable>,
    residents: Arc<Residents>,
    wishes: Arc<Wishes>,
    /// The encoder that serves.
    student: Arc<EncoderIdentity>,
    metrics: Arc<Metrics>,
    /// One change at a time: an older version must not overtake a newer one.
    change: Arc<Mutex<()>>,
}

/// How tasks are to be served, as the server was told at its start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Served merged though they could be hot.
    pub merged: TaskSet,
    /// In memory from the start to the end.
    pub pinned: TaskSet,
    /// Tasks that are loaded before the server is ready, beside the pinned ones.
    pub preload: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TaskSet {
    #[default]
    None,
    Some(BTreeSet<String>),
    All,
}

impl TaskSet {
    pub fn contains(&self, task: &str) -> bool {
        match self {
            Self::None => false,
            Self::Some(tasks) => tasks.contains(task),
            Self::All => true,
        }
    }
}

impl Publisher {
    pub fn new(
        store: Store,
        tasks: Arc<TaskTable>,
        residents: Arc<Residents>,
        wishes: Wishes,
        student: Arc<EncoderIdentity>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            store,
            tasks,
            residents,
            wishes: Arc::new(wishes),
            student,
            metrics,
            change: Arc::default(),
        }
    }

    /// Makes the table answer with what the store says is live, in the mode that it says, or take
    /// the task out if it has no live version. Until this ends, and if it fails, the version before
    /// goes on answering.
    pub async fn refresh(&self, task: &str) -> Result<(), PublishError> {
        let _change = self.change.lock().await;
        let Some(live) = self.store.live(task).await? else {
            if self.tasks.remove(task).is_some() {
                self.residents.forget(task);
                self.count();
                tracing::info!(task, "no longer answers");
            }
            return Ok(());
        };
        let mut entry = self.entry(live);
        entry.unproven = true.into();
        let same =
            |answering: &Entry| (answering.version, answering.mode) == (entry.version, entry.mode);
        if self
            .tasks
            .get(task)
            .is_some_and(|answering| same(&answering))
        {
            return Ok(());
        }
        let entry = Arc::new(entry);
        self.load(&entry).await?;
        self.tasks.publish([Arc::clone(&entry)]);
        self.count();
        warn(&entry);
        tracing::info!(task, version = entry.version, "live");
        self.residents.report(&entry).await;
        Ok(())
    }

    /// Fills the table with all tasks of the store, and loads those that are wanted at once: the
    /// pinned ones, and as many others as [`Wishes::preload`] says. One that can't be loaded is
    /// logged.
    pub async fn start(&self) -> Result<(), StoreError> {
        let _change = self.change.lock().await;
        let live = self.store.live_index().await?;
        let entries: Vec<_> = live
            .into_iter()
            .map(|live| Arc::new(self.entry(live)))
            .collect();
        self.tasks.publish(entries.iter().cloned());
        self.count();
        entries.iter().for_each(|entry| warn(entry));
        let (pinned, others): (Vec<_>, Vec<_>) = entries.iter().partition(|entry| entry.pinned);
        for entry in pinned
            .into_iter()
            .chain(others.into_iter().take(self.wishes.preload))
        {
            // The error is in the log.
            let _ = self.load(entry).await;
        }
        Ok(())
    }

    fn entry(&self, live: LiveVersion) -> Entry {
        let default = match self.wishes.merged.contains(&live.task) {
            true => Mode::Merged,
            false => Mode::Hot,
        };
        let mode = live.mode.unwrap_or(default);
        let pinned = self.wishes.pinned.contains(&live.task);
        let mut entry = Entry::new(live.task, live.version, mode, live.path, pinned);
        entry.fit = self.student.fit(&live.base);
        entry.sums = Some(live.files);
        entry
    }

    /// Brings the metrics up to date.
    fn count(&self) {
        let all = self.tasks.all();
        let count = |is: fn(&Fit) -> bool| all.values().filter(|entry| is(&entry.fit)).count();
        self.metrics.students(
            count(|fit| matches!(fit, Fit::Verified)),
            count(|fit| matches!(fit, Fit::Unverified)),
            count(|fit| matches!(fit, Fit::Mismatch(_))),
        );
    }

    async fn load(&self, entry: &Arc<Entry>) -> Result<(), Arc<LoadError>> {
        self.residents.acquire(entry).await.map(drop)
    }
}

/// Logs that a version is not certainly, or certainly not, the student's.
fn warn(entry: &Entry) {
    let (task, version) = (&entry.name, entry.version);
    match &entry.fit {
        Fit::Verified => {}
        Fit::Unverified => tracing::warn!(
            task,
            version,
            "it is not known which encoder this version was trained on; it is served unverified \
             until `kdlora adapter adopt` says"
        ),
        Fit::Mismatch(mismatch) => tracing::error!(
            task,
            version,
            reason = %mismatch,
            "this version belongs to another student and does not answer"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::KnownEncoders;
    use crate::encoder::EncoderId;
    use crate::serving::{LiveTask, Load, fixture};
    use crate::store::Origin;
    use crate::telemetry::Metrics;

    /// Loads every version but the second.
    struct NotTheSecond;

    impl Load for NotTheSecond {
        fn expected_bytes(&self, _: &Entry) -> u64 {
            10
        }

        fn load(&self, entry: &Entry) -> Result<LiveTask, LoadError> {
            // More than there may be.
            let weight_bytes = if entry.version == 2 { 1_000 } else { 10 };
            Ok(LiveTask {
                weight_bytes,
                ..fixture::task(&entry.name, entry.version)
            })
        }
    }

    fn publisher_of(
        store: &Store,
        tasks: &Arc<TaskTable>,
        residents: Arc<Residents>,
        metrics: &Arc<Metrics>,
    ) -> Publisher {
        let student = EncoderIdentity {
            id: EncoderId {
                name: "student".into(),
                digest: "d1".into(),
            },
            known: KnownEncoders::default(),
        };
        Publisher::new(
            store.clone(),
            Arc::clone(tasks),
            residents,
            Wishes::default(),
            Arc::new(student),
            Arc::clone(metrics),
        )
    }

    #[tokio::test]
    async fn metrics_name_the_version_that_answers() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(&folder.path().join("state"))
            .await
            .expect("a store");
        for version in 1..=3 {
            let source = folder.path().join(version.to_string());
            std::fs::create_dir(&source).expect("a folder");
            let report = format!(r#"{{"latency": {{"batch_1": {{"speed_up": {version}.5}}}}}}"#);
            std::fs::write(source.join("report.json"), report).expect("a file");
            let added = store.add_version("mood", &source, Origin::Imported).await;
            assert_eq!(added.expect("a version").version, version);
        }
        let metrics = Arc::new(Metrics::new().expect("metrics"));
        let residents = Residents::new(Arc::new(NotTheSecond), Some(100), Arc::clone(&metrics));
        let tasks = Arc::new(TaskTable::default());
        let publisher = publisher_of(&store, &tasks, residents, &metrics);
        let promote = async |version| {
            let promoted = store.promote("mood", version, "admin", "").await;
            promoted.expect("a promotion");
            publisher.refresh("mood").await
        };
        let told = |version: u64| {
            let text = metrics.render().expect("text");
            for line in [
                format!("kdlora_live_version{{task=\"mood\"}} {version}\n"),
                format!("kdlora_measured_speed_up{{task=\"mood\"}} {version}.5\n"),
            ] {
                assert!(text.contains(&line), "{line} in {text}");
            }
        };
        promote(1).await.expect("it answers");
        told(1);
        let refused = promote(2).await;
        assert!(matches!(refused, Err(PublishError::Load(_))), "{refused:?}");
        assert_eq!(tasks.get("mood").expect("the task").version, 1);
        told(1);
        promote(3).await.expect("it answers");
        told(3);
        // After a cold start nothing is loaded, and there is no series before the first use.
        let metrics_of_next = Arc::new(Metrics::new().expect("metrics"));
        let loader = Arc::new(NotTheSecond);
        let residents = Residents::new(loader, None, Arc::clone(&metrics_of_next));
        let next = publisher_of(&store, &Arc::default(), residents, &metrics_of_next);
        next.start().await.expect("a start");
        let line = "kdlora_live_version{task=\"mood\"} 3";
        let text = metrics_of_next.render().expect("text");
        assert!(!text.contains("mood"), "{text}");
        let entry = next.tasks.get("mood").expect("the task");
        next.residents.acquire(&entry).await.expect("it answers");
        let text = metrics_of_next.render().expect("text");
        assert!(text.contains(line), "{text}");
    }
}
