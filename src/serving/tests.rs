use std::sync::Arc;
use std::time::Duration;

use tokio::task::{JoinHandle, JoinSet, yield_now};
use tokio::time::Instant;

use super::fixture::{self, NAN, OPTIONS, PANIC, Scripted, Seen};
use super::*;

fn request(task: &Arc<Entry>, texts: &[&str]) -> Request {
    Request {
        task: Arc::clone(task),
        inputs: texts
            .iter()
            .map(|text| Input {
                text: (*text).to_owned(),
                text_pair: None,
            })
            .collect(),
        truncate: true,
        truncation_direction: None,
        deadline: Instant::now() + Duration::from_secs(60),
    }
}

/// Starts a request, and waits until its sequences stand in the queue.
async fn queued(
    serving: &Arc<Serving>,
    request: Request,
) -> JoinHandle<Result<Answer, ServingError>> {
    let before = serving.queue.len();
    let expected = before + request.inputs.len();
    let handle = tokio::spawn({
        let serving = Arc::clone(serving);
        async move { serving.classify(request).await }
    });
    until(|| serving.queue.len() >= expected).await;
    handle
}

async fn until(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "it does not come true");
        yield_now().await;
    }
}

/// Starts a request, and waits until it is at the gate.
async fn computing(
    serving: &Arc<Serving>,
    keeper: &mut fixture::Keeper,
    request: Request,
) -> JoinHandle<Result<Answer, ServingError>> {
    let serving = Arc::clone(serving);
    let handle = tokio::spawn(async move { serving.classify(request).await });
    keeper.entered().await;
    handle
}

#[tokio::test]
async fn rows_come_in_the_order_of_the_inputs() {
    let serving = fixture::start(&Arc::default(), OPTIONS);
    let task = Arc::new(fixture::resident(fixture::task("mood", 3)));
    let answer = serving
        .classify(request(&task, &["1 2", "30", "4 5 6"]))
        .await
        .expect("an answer");
    assert_eq!(answer.logits, [[3.0, 3.0], [3.0, 30.0], [3.0, 15.0]]);
    assert_eq!(answer.tokens, 6);
}

#[tokio::test]
async fn a_request_is_admitted_whole_or_not_at_all() {
    let (model, mut keeper) = Scripted::gated();
    let options = Options {
        max_queue: 3,
        ..OPTIONS
    };
    let serving = fixture::start(&model, options);
    let task = Arc::new(fixture::resident(fixture::task("mood", 1)));
    let first = computing(&serving, &mut keeper, request(&task, &["1", "2"])).await;
    let refused = serving.classify(request(&task, &["3", "4"])).await;
    assert!(
        matches!(refused, Err(ServingError::Full { .. })),
        "{refused:?}"
    );
    let second = queued(&serving, request(&task, &["5"])).await;
    keeper.pass();
    keeper.pass();
    assert!(first.await.expect("no panic").is_ok());
    assert!(second.await.expect("no panic").is_ok());
    // The permits are back.
    keeper.pass();
    assert!(
        serving
            .classify(request(&task, &["6", "7", "8"]))
            .await
            .is_ok()
    );
    assert!(!model.has_seen(3) && !model.has_seen(4));
}

#[tokio::test]
async fn a_client_that_has_gone_is_not_computed() {
    let (model, mut keeper) = Scripted::gated();
    let serving = fixture::start(&model, OPTIONS);
    let task = Arc::new(fixture::resident(fixture::task("mood", 1)));
    let first = computing(&serving, &mut keeper, request(&task, &["1"])).await;
    let gone = queued(&serving, request(&task, &["2", "3"])).await;
    let stays = queued(&serving, request(&task, &["4"])).await;
    gone.abort();
    assert!(gone.await.is_err_and(|error| error.is_cancelled()));
    assert_eq!(serving.queue.len(), 1);
    drop(keeper);
    assert!(first.await.expect("no panic").is_ok());
    assert!(stays.await.expect("no panic").is_ok());
    assert!(!model.has_seen(2) && !model.has_seen(3));
}

#[tokio::test]
async fn a_request_past_its_deadline_is_not_computed() {
    let (model, mut keeper) = Scripted::gated();
    let serving = fixture::start(&model, OPTIONS);
    let task = Arc::new(fixture::resident(fixture::task("mood", 1)));
    let first = computing(&serving, &mut keeper, request(&task, &["1"])).await;
    let hurried = Request {
        deadline: Instant::now() + Duration::from_millis(5),
        ..request(&task, &["2"])
    };
    let late = serving.classify(hurried).await;
    assert!(matches!(late, Err(ServingError::Deadline)), "{late:?}");
    assert_eq!(serving.queue.len(), 0);
    keeper.pass();
    assert!(first.await.expect("no panic").is_ok());
    keeper.pass();
    assert!(serving.classify(request(&task, &["3"])).await.is_ok());
    assert!(!model.has_seen(2));
}

#[tokio::test]
async fn a_batch_has_the_sequences_of_a_task_side_by_side() {
    let (model, mut keeper) = Scripted::gated();
    let serving = fixture::start(&model, OPTIONS);
    let mood = Arc::new(fixture::resident(fixture::task("mood", 1)));
    let topic = Arc::new(fixture::resident(fixture::task("topic", 1)));
    let newer = Arc::new(fixture::resident(fixture::task("mood", 2)));
    let mut all = vec![computing(&serving, &mut keeper, request(&mood, &["0"])).await];
    for (task, id) in [(&mood, "1"), (&topic, "2"), (&mood, "3"), (&newer, "4")] {
        all.push(queued(&serving, request(task, &[id])).await);
    }
    drop(keeper);
    for handle in all {
        assert!(handle.await.expect("no panic").is_ok());
    }
    let seen = |task: &str, version, id| Seen {
        task: task.to_owned(),
        version,
        ids: vec![id],
    };
    let expected = vec![
        vec![seen("mood", 1, 1), seen("mood", 1, 3)],
        vec![seen("mood", 2, 4)],
        vec![seen("topic", 1, 2)],
    ];
    assert_eq!(model.batches()[1], expected);
}

#[tokio::test]
async fn batches_keep_within_their_tokens() {
    let (model, mut keeper) = Scripted::gated();
    let options = Options {
        max_batch_tokens: 7,
        ..OPTIONS
    };
    let serving = fixture::start(&model, options);
    let task = Arc::new(fixture::resident(fixture::task("mood", 1)));
    let first = computing(&serving, &mut keeper, request(&task, &["1"])).await;
    let texts = ["1 1 1", "1 1 1", "1 1 1", "1 1 1 1 1 1 1 1 1", "1"];
    let second = queued(&serving, request(&task, &texts)).await;
    drop(keeper);
    assert!(first.await.expect("no panic").is_ok());
    let answer = second.await.expect("no panic").expect("an answer");
    assert_eq!(answer.tokens, 19);
    let sizes: Vec<usize> = model.batches().iter().map(|batch| batch[0].len()).collect();
    assert_eq!(sizes, [1, 2, 1, 1, 1]);
}

#[tokio::test]
async fn a_panic_or_a_nan_fails_its_batch_and_no_other() {
    let serving = fixture::start(&Arc::default(), OPTIONS);
    let task = Arc::new(fixture::resident(fixture::task("mood", 1)));
    for id in [PANIC, NAN] {
        let failed = serving
            .classify(request(&task, &["1", &id.to_string()]))
            .await;
        assert!(matches!(failed, Err(ServingError::Failed)), "{failed:?}");
        assert!(serving.classify(request(&task, &["1"])).await.is_ok());
    }
}

#[tokio::test]
async fn a_task_that_fails_leaves_the_others_of_its_batch() {
    let (model, mut keeper) = Scripted::gated();
    let serving = fixture::start(&model, OPTIONS);
    let [mood, broken, topic] =
        ["mood", "broken", "topic"].map(|name| Arc::new(fixture::resident(fixture::task(name, 1))));
    let first = computing(&serving, &mut keeper, request(&mood, &["1"])).await;
    let (panics, nan) = (PANIC.to_string(), NAN.to_string());
    let good = queued(&serving, request(&mood, &["2"])).await;
    let bad = queued(&serving, request(&broken, &[&nan, "3"])).await;
    let worse = queued(&serving, request(&broken, &[&panics])).await;
    let other = queued(&serving, request(&topic, &["4"])).await;
    drop(keeper);
    assert!(first.await.expect("no panic here").is_ok());
    for answered in [good, other] {
        assert!(answered.await.expect("no panic here").is_ok());
    }
    for failed in [bad, worse] {
        let failed = failed.await.expect("no panic here");
        assert!(matches!(failed, Err(ServingError::Failed)), "{failed:?}");
    }
}

#[tokio::test]
async fn what_fails_in_one_batch_leaves_the_queue() {
    let (model, mut keeper) = Scripted::gated();
    let options = Options {
        max_batch_tokens: 1,
        max_queue: 3,
        ..OPTIONS
    };
    let serving = fixture::start(&model, options);
    let task = Arc::new(fixture::resident(fixture::task("mood", 1)));
    let panics = PANIC.to_string();
    let failing = computing(&serving, &mut keeper, request(&task, &[&panics, "2", "3"])).await;
    keeper.pass();
    let failed = failing.await.expect("no panic here");
    assert!(matches!(failed, Err(ServingError::Failed)), "{failed:?}");
    drop(keeper);
    assert_eq!(serving.queue.len(), 0);
    // "2" may be with the worker.
    until(|| serving.admission.sequences() == 0).await;
    assert!(serving.classify(request(&task, &["4"])).await.is_ok());
    assert!(!model.has_seen(3));
}

#[tokio::test]
async fn inputs_that_are_too_long_are_named() {
    let serving = fixture::start(&Arc::default(), OPTIONS);
    let task = Arc::new(fixture::resident(fixture::task("mood", 1)));
    // On the connection's thread and, as there are so many bytes, on one of the tokenizer's.
    for words in [21, 1000] {
        let long = "1 ".repeat(words);
        let strict = Request {
            truncate: false,
            ..request(&task, &["1", &long])
        };
        let error = serving.classify(strict).await.expect_err("too long");
        assert!(
            matches!(error, ServingError::Tokenize { index: 1, .. }),
            "{error:?}"
        );
        let answer = serving.classify(request(&task, &[&long])).await;
        assert_eq!(answer.expect("cut").tokens, 20);
    }
}

#[tokio::test]
async fn idle_workers_share_what_is_queued() {
    let (model, mut keeper) = Scripted::gated();
    let options = Options {
        workers: 2,
        ..OPTIONS
    };
    let serving = fixture::start(&model, options);
    until(|| serving.queue.idle() == 2).await;
    let task = Arc::new(fixture::resident(fixture::task("mood", 1)));
    let text = "1 ".repeat(20);
    let texts = vec![text.as_str(); 10];
    let handle = computing(&serving, &mut keeper, request(&task, &texts)).await;
    keeper.entered().await;
    drop(keeper);
    assert!(handle.await.expect("no panic").is_ok());
    assert!(model.batches().len() >= 2);
}

/// Requests of several tasks in random sizes, while versions change under them: each answer is
/// that of its own texts and of one version, the one that the request started with.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn answers_are_never_mixed_while_versions_change() {
    let options = Options {
        workers: 3,
        tokenizer_threads: 2,
        max_batch_tokens: 40,
        max_queue: 100_000,
        ..OPTIONS
    };
    let serving = fixture::start(&Arc::default(), options);
    let table = Arc::new(TaskTable::default());
    let names = ["mood", "topic", "tone"];
    for name in names {
        table.publish([fixture::resident(fixture::task(name, 1))]);
    }
    let mut clients = JoinSet::new();
    for client in 0..24_u32 {
        let (serving, table) = (Arc::clone(&serving), Arc::clone(&table));
        clients.spawn(async move {
            for round in 0..20_u32 {
                let name = names[(client + round) as usize % names.len()];
                let task = table.get(name).expect("the task is there");
                let ids: Vec<u32> = (0..1 + (client * 7 + round * 3) % 11)
                    .map(|i| 1000 * client + 20 * round + i)
                    .collect();
                let texts: Vec<String> = ids.iter().map(u32::to_string).collect();
                let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
                let version = task.version as f32;
                let answer = serving.classify(request(&task, &texts)).await;
                let expected: Vec<_> = ids.iter().map(|id| vec![version, *id as f32]).collect();
                assert_eq!(answer.expect("an answer").logits, expected);
            }
        });
    }
    for version in 2..=50 {
        for name in names {
            table.publish([fixture::resident(fixture::task(name, version))]);
        }
        yield_now().await;
    }
    while let Some(client) = clients.join_next().await {
        client.expect("no answer was mixed");
    }
    assert!(
        names
            .iter()
            .all(|name| table.get(name).is_some_and(|task| task.version == 50))
    );
}
