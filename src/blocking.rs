//! Short file operations where async code cannot wait for another thread.

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::block_in_place;

/// Runs `work` on this thread, which may block. On a thread that polls other tasks too, these move
/// to another thread first.
pub fn in_place<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => block_in_place(work),
        // A runtime of one thread, as in tests, has nowhere to move them to.
        _ => work(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn other_tasks_of_the_only_worker_go_on_meanwhile() {
        let (send, receive) = mpsc::channel();
        let blocked = tokio::spawn(async move {
            tokio::spawn(async move { send.send(()) });
            in_place(|| receive.recv())
        });
        assert_eq!(blocked.await.unwrap(), Ok(()));
    }

    #[test]
    fn it_works_without_a_runtime_and_on_one_thread() {
        assert_eq!(in_place(|| 1), 1);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        assert_eq!(runtime.block_on(async { in_place(|| 2) }), 2);
    }
}
