//! Waiting for the answer to what was put into a queue.

use tokio::sync::{mpsc, oneshot};

/// The answer to a request that was sent; `None`: nobody gives one any more.
///
/// A request that gets into the queue while its reader goes is not dropped before the last sender is, and who waits for the answer
/// holds one: hence the queue is watched as well.
pub(super) async fn answered<T, R>(mut answer: oneshot::Receiver<T>, queue: &mpsc::Sender<R>) -> Option<T> {
    tokio::select! {
        biased;
        answer = &mut answer => answer.ok(),
        // It may have been given in between.
        () = queue.closed() => answer.try_recv().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_that_comes_as_its_reader_goes_has_no_answer() {
        let (queue, reader) = mpsc::channel(1);
        let (reply, answer) = oneshot::channel::<()>();
        let place = queue.reserve().await.unwrap();
        drop(reader);
        place.send(reply);
        assert_eq!(answered(answer, &queue).await, None);
    }

    #[tokio::test]
    async fn an_answer_counts_although_its_giver_is_gone() {
        let (queue, mut reader) = mpsc::channel(1);
        let (reply, answer) = oneshot::channel();
        queue.send(reply).await.unwrap();
        reader.recv().await.unwrap().send(7).unwrap();
        drop(reader);
        assert_eq!(answered(answer, &queue).await, Some(7));
    }
}
