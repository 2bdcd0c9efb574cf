//! What all requests of a load share: whom they ask, with which texts, over which connections.

use std::collections::BTreeMap;
use std::iter::repeat_n;
use std::sync::Arc;
use std::time::Duration;

use hyper::Uri;
use serde::Deserialize;

use crate::args::{Offer, TargetKind};
use crate::arrivals::{Asker, Misconduct, Questions};
use crate::error::Failure;
use crate::http::Pool;
use crate::mix::Mix;
use crate::target::{Question, Target, uri};
use crate::texts::Texts;
use crate::units::Weighted;
use crate::versions::Check;

pub(crate) struct Session {
    pub(crate) target: Target,
    pub(crate) pool: Pool,
    pub(crate) texts: Texts,
    pub(crate) tasks: Vec<Task>,
    /// Inputs in a request.
    pub(crate) batch: usize,
    pub(crate) timeout: Duration,
    /// A text that no server should take.
    pub(crate) oversize: String,
    pub(crate) check: Option<Arc<Check>>,
    pub(crate) seed: u64,
    pub(crate) watch_pid: Option<u32>,
    questions: Questions,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Task {
    pub(crate) name: String,
    pub(crate) weight: f64,
    pub(crate) path: Uri,
}

#[derive(Deserialize)]
struct TaskList {
    tasks: Vec<TaskName>,
}

#[derive(Deserialize)]
struct TaskName {
    task: String,
}

impl Session {
    /// Reads the texts and asks the server for its tasks.
    pub(crate) async fn prepare(offer: &Offer) -> Result<Self, Failure> {
        if offer.batch == 0 || offer.connections == 0 {
            return Err(Failure::Usage(
                "--batch and --connections must be at least 1".into(),
            ));
        }
        let misconduct = Misconduct {
            cancel: offer.cancel,
            disconnect: offer.disconnect,
            oversize: offer.oversize,
        };
        if misconduct.cancel + misconduct.disconnect + misconduct.oversize > 1.0 {
            return Err(Failure::Usage(
                "--cancel, --disconnect and --oversize are more than 1 together".into(),
            ));
        }
        let texts = Texts::read(&offer.texts)?;
        let target = Target::new(offer.target, &offer.url)?;
        let pool = Pool::new(&target.authority, offer.connections);
        let tasks = tasks(offer, &target, &pool).await?;
        let questions = Questions {
            tasks: Mix::new(tasks.iter().map(|task| task.weight)),
            rows: texts.len(),
            lengths: Mix::new(offer.lengths.iter().map(|length| length.weight)),
            texts: offer.lengths.iter().map(|length| length.texts).collect(),
            misconduct,
        };
        Ok(Self {
            target,
            pool,
            texts,
            tasks,
            batch: offer.batch,
            timeout: offer.timeout.0,
            oversize: repeat_n("much ", offer.oversize_chars.div_ceil(5)).collect(),
            check: None,
            seed: offer.seed,
            watch_pid: offer.watch_pid,
            questions,
        })
    }

    pub(crate) fn questions(&self) -> Questions {
        self.questions.clone()
    }

    /// What the client number `client` of a closed loop asks.
    pub(crate) fn asker(&self, client: u64) -> Asker {
        Asker::new(self.questions(), self.seed, client)
    }
}

async fn tasks(offer: &Offer, target: &Target, pool: &Pool) -> Result<Vec<Task>, Failure> {
    let task = |Weighted { name, weight }: Weighted| {
        let path = uri(&target.path(&name))?;
        Ok(Task { name, weight, path })
    };
    if offer.target == TargetKind::Tei {
        if !offer.tasks.is_empty() || offer.all_tasks {
            return Err(Failure::Usage(
                "a text-embeddings-inference server has one model and no tasks; leave --tasks and \
                 --all-tasks out"
                    .into(),
            ));
        }
        let only = Weighted {
            name: "predict".to_owned(),
            weight: 1.0,
        };
        return Ok(vec![task(only)?]);
    }
    let list: TaskList = target.ask(pool, Question::get("/v1/tasks")).await?;
    let there: Vec<String> = list.tasks.into_iter().map(|task| task.task).collect();
    chosen(offer, &there)?.into_iter().map(task).collect()
}

/// The tasks to ask, of those that are there.
fn chosen(offer: &Offer, there: &[String]) -> Result<Vec<Weighted>, Failure> {
    let names = || match there {
        [] => "it has none".to_owned(),
        names => format!("it has {}", names.join(", ")),
    };
    if offer.all_tasks && !there.is_empty() {
        let all = there.iter().map(|name| Weighted {
            name: name.clone(),
            weight: 1.0,
        });
        return Ok(all.collect());
    }
    if offer.tasks.is_empty() {
        return Err(Failure::Usage(format!(
            "name the tasks to ask with --tasks, or take --all-tasks; {}",
            names()
        )));
    }
    let mut weights = BTreeMap::new();
    for task in &offer.tasks {
        if !there.contains(&task.name) {
            return Err(Failure::Usage(format!(
                "the server has no task {:?}; {}",
                task.name,
                names()
            )));
        }
        if weights.insert(&task.name, task.weight).is_some() {
            return Err(Failure::Usage(format!(
                "task {:?} is named twice",
                task.name
            )));
        }
    }
    Ok(offer.tasks.clone())
}

#[cfg(test)]
pub(crate) mod fixture {
    use hyper::body::Incoming;
    use hyper::{Request, Response};

    use super::*;
    use crate::http::{Body, mock};
    use crate::texts::Row;

    /// The right answer to a request of [`session`].
    pub(crate) const ANSWER: &str = r#"{"task":"mood","version":1,"predictions":[
        {"label":"up","score":0.75,"scores":{"up":0.75,"down":0.25}}],"usage":{"tokens":7}}"#;

    /// A session with the task `mood` of a server in this runtime.
    pub(crate) fn session<F, A>(connections: usize, answer: F) -> Session
    where
        F: Fn(Request<Incoming>) -> A + Clone + Send + Sync + 'static,
        A: Future<Output = Response<Body>> + Send + 'static,
    {
        let target = Target::new(TargetKind::Kdlora, "http://mock").expect("a URL");
        let row = Row {
            text: "a fine day".to_owned(),
            text_pair: None,
        };
        let tasks = vec![Task {
            name: "mood".to_owned(),
            weight: 1.0,
            path: uri(&target.path("mood")).expect("a path"),
        }];
        Session {
            target,
            pool: mock::pool(connections, answer),
            texts: Texts::new(vec![row]).expect("a row"),
            tasks,
            batch: 1,
            timeout: Duration::from_secs(30),
            oversize: "much ".repeat(100),
            check: None,
            seed: 1,
            watch_pid: None,
            questions: Questions {
                tasks: Mix::new([1.0]),
                rows: 1,
                lengths: Mix::new([1.0]),
                texts: vec![1],
                misconduct: Misconduct::default(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Args, Command};

    fn names(flags: &str) -> Result<Vec<String>, String> {
        let words = format!("loadtest closed {flags}");
        let args = Args::try_parse_from(words.split_whitespace()).expect("flags");
        let Command::Closed(args) = args.command else {
            panic!("not the command")
        };
        let there = ["a".to_owned(), "b".to_owned()];
        match chosen(&args.offer, &there) {
            Ok(tasks) => Ok(tasks.into_iter().map(|task| task.name).collect()),
            Err(error) => Err(error.chain()),
        }
    }

    #[test]
    fn tasks_are_those_named_or_all() {
        assert_eq!(names("--tasks b"), Ok(vec!["b".to_owned()]));
        assert_eq!(names("--all-tasks").map(|all| all.len()), Ok(2));
        for (flags, sentence) in [
            ("", "it has a, b"),
            ("--tasks c", "no task \"c\"; it has a, b"),
            ("--tasks a,a=2", "named twice"),
        ] {
            let error = names(flags).expect_err(flags);
            assert!(error.contains(sentence), "{error}");
        }
    }
}
