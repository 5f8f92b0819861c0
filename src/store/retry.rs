//! Asking again what failed in a way that can pass: exponential backoff with jitter, and what the server asks for.

use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use super::StoreError;

/// Retries when nothing is said, as desync.
pub const DEFAULT_RETRIES: u32 = 3;

/// The longest a server's Retry-After is followed.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// How often and how soon a failed request is made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Further requests after the first.
    pub n_retries: u32,
    /// The span the first wait is chosen from; each further span is twice as long.
    pub base: Duration,
    /// The longest span.
    pub max: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self { n_retries: DEFAULT_RETRIES, base: Duration::from_millis(200), max: Duration::from_secs(5) }
    }
}

impl RetryPolicy {
    /// No retries.
    pub const NEVER: Self = Self { n_retries: 0, base: Duration::ZERO, max: Duration::ZERO };

    /// How long to wait before retry number `retry` (from 0): a random time of the upper half of its span, so that many clients do not
    /// come back at once, and never all of them at once with none in between.
    pub fn wait(&self, retry: u32) -> Duration {
        let span = self.base.saturating_mul(1u32.checked_shl(retry).unwrap_or(u32::MAX)).min(self.max);
        // A hasher's seed is the one source of random numbers in the standard library.
        let random = RandomState::new().hash_one(retry) % 1024;
        span.mul_f64(0.5 + random as f64 / 2048.0)
    }
}

/// A request that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Why; asked again only if it is transient.
    pub error: StoreError,
    /// How long the server asks to be left alone.
    pub retry_after: Option<Duration>,
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self { error, retry_after: None }
    }
}

/// Makes a request, and again as long as it fails in a way that can pass and the policy allows. `request` is told how many there were.
///
/// # Errors
/// That of the last request.
pub async fn retry<T, F>(policy: RetryPolicy, mut request: impl FnMut(u32) -> F) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, Failure>>,
{
    let mut n_before = 0;
    loop {
        let Failure { error, retry_after } = match request(n_before).await {
            Ok(done) => return Ok(done),
            Err(failure) => failure,
        };
        if !error.is_transient || n_before >= policy.n_retries {
            return Err(error);
        }
        let wait = retry_after.map_or(Duration::ZERO, |span| span.min(MAX_RETRY_AFTER)).max(policy.wait(n_before));
        tracing::debug!("{error}; asking again in {} ms", wait.as_millis());
        tokio::time::sleep(wait).await;
        n_before += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: RetryPolicy =
        RetryPolicy { n_retries: 3, base: Duration::from_millis(100), max: Duration::from_millis(250) };

    #[test]
    fn waits_double_up_to_the_longest() {
        for (n_before, span) in [(0, 100), (1, 200), (2, 250), (31, 250), (99, 250)] {
            for _ in 0..20 {
                let wait = POLICY.wait(n_before).as_millis();
                assert!((span / 2..=span).contains(&wait), "{n_before}: {wait} ms");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_can_pass_is_asked_again() {
        for (is_transient, n_requests) in [(true, 4), (false, 1)] {
            let mut n = 0;
            let done: Result<(), _> = retry(POLICY, |n_before| {
                assert_eq!(n_before, n);
                n += 1;
                let error = StoreError { is_transient, ..StoreError::new("s", "o", "r") };
                async move { Err(error.into()) }
            })
            .await;
            assert!(done.is_err());
            assert_eq!(n, n_requests);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_server_is_left_alone_as_long_as_it_asks() {
        let start = tokio::time::Instant::now();
        let done = retry(POLICY, |n_before| async move {
            match n_before {
                0 => Err(Failure {
                    error: StoreError::transient("s", "o", "429"),
                    retry_after: Some(Duration::from_secs(7)),
                }),
                _ => Ok(n_before),
            }
        })
        .await;
        assert_eq!(done, Ok(1));
        assert_eq!(start.elapsed().as_secs(), 7);
    }
}
