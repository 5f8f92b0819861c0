//! Lines that say again what was just said: they are counted, and the count is said instead.
//!
//! A machine that tries a read again for ever, of a chunk that is nowhere, would fill the disk with one and the same line.
//!
//! Invariant: nothing is held back for longer than [`FOLD_FOR`], and no more than [`MAX_KNOWN`] lines are held.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::Line;

/// For how long a line is not said again.
pub(super) const FOLD_FOR: Duration = Duration::from_secs(10);

/// How many lines are compared with: what is tried again is one or a few requests.
const MAX_KNOWN: usize = 64;

/// What was said lately, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Folded {
    known: VecDeque<Known>,
}

#[derive(Debug)]
struct Known {
    /// As it was said last.
    line: Line,
    since: Instant,
    n_more: u64,
}

impl Folded {
    /// The lines to write when this one comes.
    pub(super) fn take(&mut self, line: Line, now: Instant) -> Vec<Line> {
        let mut due = self.expire(now);
        match self.known.iter_mut().find(|known| known.line.says_the_same_as(&line)) {
            Some(known) => {
                known.n_more += 1;
                known.line = line;
            }
            None => {
                if self.known.len() >= MAX_KNOWN {
                    due.extend(self.known.pop_front().and_then(Known::said));
                }
                due.push(line.clone());
                self.known.push_back(Known { line, since: now, n_more: 0 });
            }
        }
        due
    }

    /// The counts whose time has come.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<Line> {
        let mut due = Vec::new();
        while let Some(oldest) = self.known.front()
            && now.duration_since(oldest.since) >= FOLD_FOR
        {
            due.extend(self.known.pop_front().and_then(Known::said));
        }
        due
    }

    /// All counts, before their time.
    pub(super) fn end(&mut self) -> Vec<Line> {
        std::mem::take(&mut self.known).into_iter().filter_map(Known::said).collect()
    }

    /// How long until the next count is due; `None` when there is none.
    pub(super) fn due(&self, now: Instant) -> Option<Duration> {
        let first = self.known.iter().find(|known| known.n_more > 0)?;
        Some(FOLD_FOR.saturating_sub(now.duration_since(first.since)))
    }
}

impl Known {
    /// What is to be said of the lines that were held back.
    fn said(self) -> Option<Line> {
        let Self { mut line, n_more, .. } = self;
        if n_more == 0 {
            return None;
        }
        let end = line.text.strip_suffix(b"\n").unwrap_or(&line.text).len();
        line.text.truncate(end);
        line.text.extend_from_slice(format!(" ({n_more} more of these)\n").as_bytes());
        Some(line)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tracing::Level;

    use super::*;

    fn line(text: &str) -> Line {
        Line { level: Level::WARN, has_time: true, text: text.as_bytes().to_vec() }
    }

    fn texts(lines: Vec<Line>) -> Vec<String> {
        lines.into_iter().map(|line| String::from_utf8(line.text).unwrap()).collect()
    }

    #[test]
    fn lines_that_say_the_same_are_counted_whatever_the_time() {
        let mut folded = Folded::default();
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        assert_eq!(texts(folded.take(line("01:00 a\n"), at(0))), ["01:00 a\n"]);
        assert_eq!(texts(folded.take(line("01:01 b\n"), at(1))), ["01:01 b\n"]);
        assert_eq!(folded.due(at(1)), None, "nothing is held back");
        assert!(folded.take(line("01:02 a\n"), at(2)).is_empty());
        assert!(folded.take(line("01:03 a\n"), at(3)).is_empty());
        assert_eq!(folded.due(at(3)), Some(Duration::from_secs(7)));
        assert_eq!(texts(folded.expire(at(10))), ["01:03 a (2 more of these)\n"]);
        assert_eq!(texts(folded.take(line("01:11 a\n"), at(11))), ["01:11 a\n"], "and begins anew");
        assert!(folded.take(line("01:12 a\n"), at(12)).is_empty());
        assert_eq!(texts(folded.end()), ["01:12 a (1 more of these)\n"]);
        assert!(folded.end().is_empty());
    }

    #[test]
    fn lines_that_differ_are_all_said_and_few_are_held() {
        let mut folded = Folded::default();
        let now = Instant::now();
        folded.take(line("01:00 x\n"), now);
        folded.take(line("01:00 x\n"), now);
        let mut all = Vec::new();
        for number in 0..1000 {
            all.extend(texts(folded.take(line(&format!("01:00 {number}\n")), now)));
        }
        assert_eq!(all.len(), 1001);
        assert!(all.contains(&"01:00 x (1 more of these)\n".to_owned()), "{all:?}");
        assert_eq!(folded.known.len(), MAX_KNOWN);
        // Another level, or no time before the text, is another line.
        let bare = Line { has_time: false, ..line("01:00 1\n") };
        assert!(!bare.says_the_same_as(&line("01:00 1\n")));
        assert!(!Line { level: Level::ERROR, ..line("a b\n") }.says_the_same_as(&line("a b\n")));
    }
}
