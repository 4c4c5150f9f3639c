//! Durations of one thing, and what is said of them.

use std::time::{Duration, Instant};

/// See the module.
#[derive(Debug, Clone, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn push(&mut self, took: Duration) {
        self.0.push(took.as_secs_f64());
    }

    /// Adds one in whatever unit.
    pub(crate) fn push_value(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Runs it and takes the time.
    pub(crate) fn time<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let result = work();
        self.push(begun.elapsed());
        result
    }

    /// Awaits it and takes the time.
    pub(crate) async fn await_it<T>(&mut self, work: impl Future<Output = T>) -> T {
        let begun = Instant::now();
        let result = work.await;
        self.push(begun.elapsed());
        result
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The nearest rank, between 0 and 100.
    pub(crate) fn percentile(&self, percent: usize) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied()
    }

    pub(crate) fn p50(&self) -> Option<f64> {
        self.percentile(50)
    }

    /// Sample by sample, the sum: what several steps of the same round took together.
    pub(crate) fn plus(&self, other: &Samples) -> Samples {
        Samples(self.0.iter().zip(&other.0).map(|(a, b)| a + b).collect())
    }

    /// `p50 / p95 (min)` in milliseconds.
    pub(crate) fn ms(&self) -> String {
        if self.is_empty() {
            return "-".to_owned();
        }
        let at = |percent| self.percentile(percent).unwrap_or_default() * 1e3;
        let digits = if at(50) < 10.0 { 2 } else { 1 };
        format!("{:.digits$} / {:.digits$} ({:.digits$})", at(50), at(95), at(0))
    }
}
