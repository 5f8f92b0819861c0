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

/// A span from `30` (seconds), `500ms`, `30s`, `1m`, `2h`, or in Go's way (as desync's flags take it) `1m30s`, `1.5s`; at most
/// [`MAX_SPAN`].
pub fn parse_span(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.parse::<u64>() {
        let is_plain = text.bytes().all(|byte| byte.is_ascii_digit());
        return Some(Duration::from_secs(seconds)).filter(|span| is_plain && *span <= MAX_SPAN);
    }
    let mut rest = text;
    let mut span = Duration::ZERO;
    while !rest.is_empty() {
        let (number, behind) = split_at_end(rest, |c| c.is_ascii_digit() || c == '.');
        let (unit, behind) = split_at_end(behind, |c| !c.is_ascii_digit() && c != '.');
        let nanos: u64 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" | "min" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        span = span.checked_add(decimal(number, nanos)?).filter(|span| *span <= MAX_SPAN)?;
        rest = behind;
    }
    (!text.is_empty()).then_some(span)
}

/// A number such as `3` or `1.5` of units of so many nanoseconds.
fn decimal(number: &str, unit_nanos: u64) -> Option<Duration> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return None;
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let mut nanos = whole.checked_mul(unit_nanos)?;
    let mut place = unit_nanos;
    for digit in fraction.bytes() {
        place /= 10;
        nanos = nanos.checked_add(u64::from(digit - b'0') * place)?;
    }
    Some(Duration::from_nanos(nanos))
}

/// A span as [`parse_span`] reads it.
pub fn show_span(span: Duration) -> String {
    match (span.as_secs(), span.subsec_nanos()) {
        (seconds, 0) => format!("{seconds}s"),
        (_, nanos) if nanos % 1_000_000 == 0 => format!("{}ms", span.as_millis()),
        _ => format!("{}ns", span.as_nanos()),
    }
}

/// A size as [`parse_size`] reads it, in the largest unit that it is a whole number of.
pub fn show_size(n_bytes: u64) -> String {
    let shift = (n_bytes.trailing_zeros() / 10 * 10).min(40);
    match shift {
        _ if n_bytes == 0 => "0".to_owned(),
        10 | 20 | 30 | 40 => format!("{}{}", n_bytes >> shift, ["K", "M", "G", "T"][shift as usize / 10 - 1]),
        _ => n_bytes.to_string(),
    }
}

/// A user or group number; the one that means "nobody in particular" to the kernel (-1) is none.
pub fn parse_id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|&id| id != u32::MAX)
}

/// Permission bits in octal, as umask(1) takes them.
pub fn parse_mode(text: &str) -> Option<u16> {
    u16::from_str_radix(text, 8).ok().filter(|&mode| mode <= 0o777 && text.bytes().all(|byte| byte.is_ascii_digit()))
}

/// A SHA-256 in hexadecimal.
pub fn parse_sha256(text: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (i, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    text.bytes().all(|byte| byte.is_ascii_hexdigit()).then_some(digest)
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
    split_at_end(text, |c| c.is_ascii_digit())
}

/// The longest beginning whose characters all belong, and the rest.
fn split_at_end(text: &str, belongs: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(|c| !belongs(c)).unwrap_or(text.len()))
}

/// Of some names, the one that differs least from a mistyped one, if it differs little for its length.
pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let name = name.replace('_', "-").to_ascii_lowercase();
    let (n, nearest) = known.map(|known| (distance(&name, known), known)).min_by_key(|(n, _)| *n)?;
    (n <= 2 && n < nearest.len().div_ceil(2)).then_some(nearest)
}

/// How many letters have to be changed, added or removed to come from one word to the other.
fn distance(a: &str, b: &str) -> usize {
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
    fn sizes_are_shown_as_they_are_read() {
        for (n_bytes, shown) in [
            (0, "0"),
            (1, "1"),
            (1023, "1023"),
            (1 << 10, "1K"),
            (1536, "1536"),
            (3 << 19, "1536K"),
            (20 << 30, "20G"),
            (1 << 50, "1024T"),
        ] {
            assert_eq!(show_size(n_bytes), shown);
            assert_eq!(parse_size(shown), Some(n_bytes));
        }
    }

    #[test]
    fn modes_and_digests() {
        for (text, mode) in [
            ("022", Some(0o22)),
            ("0", Some(0)),
            ("777", Some(0o777)),
            ("1777", None),
            ("8", None),
            ("+7", None),
            ("", None),
        ] {
            assert_eq!(parse_mode(text), mode, "{text}");
        }
        let hex = "00ff".repeat(16);
        assert_eq!(parse_sha256(&hex).map(|digest| (digest[0], digest[1], digest[31])), Some((0, 255, 255)));
        for text in ["", "00", &"+f".repeat(32), &"0g".repeat(32), &"é".repeat(32)] {
            assert_eq!(parse_sha256(text), None, "{text}");
        }
    }

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
            ("1m30s", Some(90_000)),
            ("1.5s", Some(1500)),
            (".5s", Some(500)),
            ("1h0.25m", Some(3_615_000)),
            ("2000us", Some(2)),
            ("3000000ns", Some(3)),
            ("18446744073709551615", None),
            ("18446744073709551615h", None),
            ("99999999999999999999s", None),
            ("1d", None),
            ("", None),
            ("s", None),
            (".s", None),
            ("1.2.3s", None),
            ("1.5", None),
            ("1m30", None),
            ("+1", None),
            ("-1s", None),
        ] {
            let span = parse_span(text);
            assert_eq!(span, millis.map(Duration::from_millis), "{text}");
            assert!(span.is_none_or(|span| parse_span(&show_span(span)) == Some(span)), "{text}");
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
