//! Values as people write them: sizes, spans of time, numbers, yes and no.

use std::time::Duration;

/// The longest span that an option takes, so that adding it to a clock cannot overflow.
pub const MAX_SPAN: Duration = Duration::from_secs(24 * 60 * 60);

/// Bytes from `1G`, `512M`, `64k`, `4096`: powers of 1024, in any case, with or without a final `B` or `iB`.
pub fn parse_size(text: &str) -> Option<u64> {
    let (digits, unit) = split_unit(text);
    let number: u64 = digits.parse().ok()?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}

/// A span from `30` (seconds), `500ms`, `30s`, `1m`, `2h`, at most [`MAX_SPAN`].
pub fn parse_span(text: &str) -> Option<Duration> {
    let (digits, unit) = split_unit(text);
    let number: u64 = digits.parse().ok()?;
    let millis = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" | "min" => 60 * 1000,
        "h" => 60 * 60 * 1000,
        _ => return None,
    };
    let span = Duration::from_millis(number.checked_mul(millis)?);
    (span <= MAX_SPAN).then_some(span)
}

/// A user or group number; the one that means "nobody in particular" to the kernel (-1) is none.
pub fn parse_id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|&id| id != u32::MAX)
}

/// Yes or no in the usual words.
pub fn parse_switch(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "yes" | "true" | "on" | "1" => Some(true),
        "no" | "false" | "off" | "0" => Some(false),
        _ => None,
    }
}

fn split_unit(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text.split_at(end)
}

/// How many letters have to be changed, added or removed to come from one word to the other.
pub(super) fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("4096", Some(4096)),
            ("64k", Some(64 << 10)),
            ("64K", Some(64 << 10)),
            ("512M", Some(512 << 20)),
            ("1GiB", Some(1 << 30)),
            ("2T", Some(2 << 40)),
            ("99999999T", None),
            ("16777216T", None),
            ("1.5G", None),
            ("-1", None),
            ("+1", None),
            ("G", None),
            ("", None),
            ("1 G", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(parse_size(text), bytes, "{text}");
        }
    }

    #[test]
    fn spans() {
        for (text, millis) in [
            ("30", Some(30_000)),
            ("30s", Some(30_000)),
            ("1m", Some(60_000)),
            ("500ms", Some(500)),
            ("24h", Some(86_400_000)),
            ("25h", None),
            ("18446744073709551615", None),
            ("1d", None),
            ("", None),
            ("s", None),
        ] {
            assert_eq!(parse_span(text), millis.map(Duration::from_millis), "{text}");
        }
    }

    #[test]
    fn ids_and_switches() {
        assert_eq!(parse_id("0"), Some(0));
        assert_eq!(parse_id("4294967294"), Some(u32::MAX - 1));
        assert_eq!(parse_id("4294967295"), None);
        assert_eq!(parse_id("root"), None);
        assert_eq!(parse_switch("Yes"), Some(true));
        assert_eq!(parse_switch("off"), Some(false));
        assert_eq!(parse_switch("maybe"), None);
    }

    #[test]
    fn distances() {
        for (a, b, n) in [("", "", 0), ("abc", "", 3), ("stroe", "store", 2), ("store", "stores", 1), ("uid", "gid", 1)]
        {
            assert_eq!(distance(a, b), n, "{a} {b}");
            assert_eq!(distance(b, a), n, "{b} {a}");
        }
    }
}
