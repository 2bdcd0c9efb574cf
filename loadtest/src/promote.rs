//! `loadtest promote`: a load during which versions are promoted in turn.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, interval_at};
use tokio_util::sync::CancellationToken;

use crate::args::{PromoteArgs, TargetKind};
use crate::error::Failure;
use crate::http::Pool;
use crate::open_loop::measure;
use crate::report::{Quantiles, Report};
use crate::session::Session;
use crate::target::Question;
use crate::times::quantiles;
use crate::units::Turns;
use crate::versions::{Check, Prediction};
use crate::watch::Watch;

/// Texts in a request while answers are learnt.
const LEARNT_AT_A_TIME: usize = 32;

/// How the promotions went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Promotions {
    pub(crate) asked_per_second: f64,
    pub(crate) attempted: u64,
    pub(crate) succeeded: u64,
    /// By what was answered.
    pub(crate) failures: BTreeMap<String, u64>,
    pub(crate) seconds: f64,
    /// Of the successful.
    pub(crate) latency: Quantiles,
    /// Answers that were checked by, of all tasks and versions.
    pub(crate) learnt_answers: usize,
}

#[derive(Deserialize)]
struct Versions {
    versions: Vec<Version>,
}

#[derive(Deserialize)]
struct Version {
    version: u64,
}

#[derive(Deserialize)]
struct Answers {
    version: u64,
    predictions: Vec<Prediction>,
}

#[derive(Serialize)]
struct Promotion<'a> {
    version: u64,
    reason: &'a str,
}

#[derive(Serialize)]
struct Lesson<'a> {
    inputs: Vec<LessonInput<'a>>,
}

#[derive(Serialize)]
struct LessonInput<'a> {
    text: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    text_pair: Option<&'a str>,
}

pub(crate) async fn run(args: &PromoteArgs) -> Result<Report, Failure> {
    let offer = &args.run.offer;
    if offer.target != TargetKind::Kdlora {
        return Err(Failure::Usage("only a kdlora server has versions".into()));
    }
    let mut session = Session::prepare(offer).await?;
    let mut report = Report::new("promote", offer, args, &session)?;
    let promoter = Promoter::prepare(&session, args).await?;
    let mut check = Check::new(args.tolerance);
    promoter.learn(&session, &mut check, args.learn).await?;
    let check = Arc::new(check);
    session.check = Some(Arc::clone(&check));
    let session = Arc::new(session);

    let watch = Watch::start(&session);
    let stop = CancellationToken::new();
    let promoting = tokio::spawn({
        let (session, check, stop) = (Arc::clone(&session), Arc::clone(&check), stop.clone());
        async move { promoter.promote(&session, &check, stop).await }
    });
    let measured = measure(
        &session,
        &args.run.phases(),
        args.run.warm_up.0,
        session.seed,
    )
    .await;
    stop.cancel();
    report.promotions = promoting.await.ok();
    report.watch = watch.stop().await;
    report.add(measured);
    Ok(report)
}

struct Promoter {
    /// Promotions must not wait for a connection behind the load.
    pool: Pool,
    turns: Vec<Turn>,
    per_second: f64,
    token: Option<String>,
}

/// A task and the versions that follow one another.
struct Turn {
    task: usize,
    versions: Vec<u64>,
}

impl Promoter {
    async fn prepare(session: &Session, args: &PromoteArgs) -> Result<Self, Failure> {
        let token = match &args.admin_token_file {
            Some(path) => {
                let text = fs::read_to_string(path).map_err(|source| Failure::Read {
                    path: path.clone(),
                    source,
                })?;
                Some(text.trim().to_owned())
            }
            None => None,
        };
        let named = !args.turns.is_empty();
        let all = session.tasks.iter().map(|task| Turns {
            task: task.name.clone(),
            versions: Vec::new(),
        });
        let asked = if named {
            args.turns.clone()
        } else {
            all.collect()
        };
        let mut turns = Vec::new();
        for Turns { task, versions } in asked {
            let place = session.tasks.iter().position(|known| known.name == task);
            let place = place.ok_or_else(|| {
                Failure::Usage(format!(
                    "task {task:?} of --promote is not among those that are asked; add it to --tasks"
                ))
            })?;
            let versions = match versions.as_slice() {
                [] => versions_of(session, &task, token.as_deref()).await?,
                _ => versions,
            };
            if versions.len() >= 2 {
                turns.push(Turn {
                    task: place,
                    versions,
                });
            } else if named {
                return Err(Failure::Usage(format!(
                    "task {task:?} has only one version; distil another first"
                )));
            }
        }
        if turns.is_empty() {
            return Err(Failure::Usage(
                "none of the tasks has two versions to promote in turn".into(),
            ));
        }
        Ok(Self {
            pool: Pool::new(&session.target.authority, 1),
            turns,
            per_second: args.promote_rate,
            token,
        })
    }

    /// Asks each version, one at a time, for its answers to the first `texts` texts. The last
    /// version of each turn is live afterwards.
    async fn learn(
        &self,
        session: &Session,
        check: &mut Check,
        texts: usize,
    ) -> Result<(), Failure> {
        for turn in &self.turns {
            for version in &turn.versions {
                self.make_live(session, turn.task, *version).await?;
                let answers = answers(session, turn.task, *version, texts).await?;
                check.learn(turn.task, *version, answers);
            }
            if let Some(live) = turn.versions.last() {
                check.asked(turn.task, *live);
                check.acknowledged(turn.task);
            }
        }
        Ok(())
    }

    /// Task and version of a promotion. The last version of each task is live at the beginning, so
    /// the first comes first.
    fn turn(&self, promotion: usize) -> (usize, u64) {
        let (round, place) = (promotion / self.turns.len(), promotion % self.turns.len());
        let Turn { task, versions } = &self.turns[place];
        (*task, versions[round % versions.len()])
    }

    async fn make_live(&self, session: &Session, task: usize, version: u64) -> Result<(), Failure> {
        let path = format!("/admin/tasks/{}/promote", session.tasks[task].name);
        let promotion = Promotion {
            version,
            reason: "load test",
        };
        let question = Question {
            path: &path,
            body: Some(serde_json::to_vec(&promotion).map_err(Failure::Json)?),
            token: self.token.as_deref(),
        };
        session.target.fetch(&self.pool, question).await?;
        Ok(())
    }

    /// Promotes at the asked-for pace until `stop`: tasks take turns, and so do the versions of
    /// each. One promotion at a time; if they take longer than the pace allows, they follow one
    /// another at once.
    async fn promote(
        &self,
        session: &Session,
        check: &Check,
        stop: CancellationToken,
    ) -> Promotions {
        let start = Instant::now();
        let pace = Duration::from_secs_f64(1.0 / self.per_second);
        let mut pace = interval_at(start + pace, pace);
        let mut latencies = Vec::new();
        let mut failures = BTreeMap::new();
        let mut attempted = 0;
        loop {
            tokio::select! {
                _ = pace.tick() => {}
                // One that has begun is always finished: the check must know its end.
                () = stop.cancelled() => break,
            }
            let (task, version) = self.turn(attempted);
            attempted += 1;
            check.asked(task, version);
            let sent = Instant::now();
            match self.make_live(session, task, version).await {
                Ok(()) => {
                    check.acknowledged(task);
                    latencies.push(sent.elapsed());
                }
                Err(error) => *failures.entry(error.chain()).or_default() += 1,
            }
        }
        Promotions {
            asked_per_second: self.per_second,
            attempted: attempted as u64,
            succeeded: latencies.len() as u64,
            failures,
            seconds: start.elapsed().as_secs_f64(),
            latency: quantiles(latencies),
            learnt_answers: check.learnt(),
        }
    }
}

async fn versions_of(
    session: &Session,
    task: &str,
    token: Option<&str>,
) -> Result<Vec<u64>, Failure> {
    let path = format!("/admin/tasks/{task}/versions");
    let question = Question {
        token,
        ..Question::get(&path)
    };
    let list: Versions = session.target.ask(&session.pool, question).await?;
    Ok(list.versions.into_iter().map(|v| v.version).collect())
}

/// What the live version answers to the first `texts` texts; it must be `version`.
async fn answers(
    session: &Session,
    task: usize,
    version: u64,
    texts: usize,
) -> Result<Vec<Prediction>, Failure> {
    let name = &session.tasks[task].name;
    let path = format!("/v1/classify/{name}");
    let count = texts.min(session.texts.len());
    let inputs = session.texts.inputs(0, count, 1);
    let mut all = Vec::with_capacity(count);
    for part in inputs.chunks(LEARNT_AT_A_TIME) {
        let inputs = part.iter().map(|input| LessonInput {
            text: &input.text,
            text_pair: input.text_pair,
        });
        let lesson = Lesson {
            inputs: inputs.collect(),
        };
        let question = Question {
            path: &path,
            body: Some(serde_json::to_vec(&lesson).map_err(Failure::Json)?),
            token: None,
        };
        let Answers {
            version: given,
            predictions,
        } = session.target.ask(&session.pool, question).await?;
        if given != version || predictions.len() != part.len() {
            return Err(Failure::Usage(format!(
                "version {version} of task {name:?} was promoted, but version {given} answers \
                 {} of {} texts",
                predictions.len(),
                part.len()
            )));
        }
        all.extend(predictions);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_take_turns_and_so_do_their_versions() {
        let turn = |task, versions: &[u64]| Turn {
            task,
            versions: versions.to_vec(),
        };
        let promoter = Promoter {
            pool: Pool::new("mock:80", 1),
            turns: vec![turn(5, &[1, 2]), turn(7, &[3, 4, 6])],
            per_second: 1.0,
            token: None,
        };
        let order: Vec<_> = (0..8).map(|i| promoter.turn(i)).collect();
        let expected = [
            (5, 1),
            (7, 3),
            (5, 2),
            (7, 4),
            (5, 1),
            (7, 6),
            (5, 2),
            (7, 3),
        ];
        assert_eq!(order, expected);
    }
}
