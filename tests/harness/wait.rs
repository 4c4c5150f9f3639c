//! Waiting with a deadline, and chance that can be repeated.

use std::time::{Duration, Instant};

/// How long to pause between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// Looks until `look` is content or the deadline has passed; then panics with what it said last.
pub async fn eventually<T, F>(deadline: Duration, what: &str, mut look: F) -> T
where
    F: AsyncFnMut() -> Result<T, String>,
{
    let begun = Instant::now();
    loop {
        match look().await {
            Ok(value) => return value,
            Err(why) if begun.elapsed() > deadline => panic!("{what}: not within {deadline:?}: {why}"),
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// A small generator (xorshift64*), seeded from `OCID_TEST_SEED` or the clock; the seed is printed, so that a failed
/// run can be repeated.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Seeds from the environment or the clock and prints the seed.
    pub fn seeded() -> Random {
        let given = std::env::var("OCID_TEST_SEED").ok().and_then(|s| s.parse().ok());
        let seed = given.unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            u64::from(now.subsec_nanos()) ^ now.as_secs()
        });
        eprintln!("OCID_TEST_SEED={seed}");
        Random(seed | 1)
    }

    /// A generator of its own for one task.
    #[must_use]
    pub fn fork(&mut self) -> Random {
        Random(self.next() | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// A time between the two.
    pub fn between(&mut self, from: Duration, to: Duration) -> Duration {
        let span = u64::try_from((to - from).as_micros()).unwrap();
        from + Duration::from_micros(self.below(span.max(1)))
    }
}
