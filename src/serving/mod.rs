//! Admission, queue, batcher, workers, and the table of live tasks.
