//! Numbers as people read them: bytes, spans, counts, shares.

/// Bytes as `1.2 GiB`.
pub fn bytes(n_bytes: u64) -> String {
    let mut value = n_bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB", "TiB"] {
        if value < 1023.95 || unit == "TiB" {
            return match unit {
                "B" => format!("{n_bytes} B"),
                _ => format!("{value:.1} {unit}"),
            };
        }
        value /= 1024.0;
    }
    unreachable!("the last unit takes everything")
}

/// A span of seconds as `12 ms`, `3.4 s`, `2m 5s`, `3h 12m`, `4d 2h`.
pub fn span(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match seconds {
        s if s < 0.000_999_5 => format!("{:.0} us", s.max(0.0) * 1e6),
        s if s < 0.099_95 => format!("{:.1} ms", s * 1e3),
        s if s < 0.999_5 => format!("{:.0} ms", s * 1e3),
        s if s < 59.95 => format!("{s:.1} s"),
        _ if whole < 3600 => format!("{}m {}s", whole / 60, whole % 60),
        _ if whole < 86_400 => format!("{}h {}m", whole / 3600, whole % 3600 / 60),
        _ => format!("{}d {}h", whole / 86_400, whole % 86_400 / 3600),
    }
}

/// A number with commas, as `12,345`.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// What is said of a store with so many errors since its last answer.
pub fn failing(n_errors: u32) -> String {
    let errors = if n_errors == 1 { "error" } else { "errors" };
    format!("failing, {} {errors} in a row", count(n_errors.into()))
}

/// A share from 0 to 1 as `34 %`. Neither nothing nor everything is said of what is only nearly so.
pub fn percent(share: f64) -> String {
    match share {
        s if s > 0.0 && s < 0.01 => "<1 %".to_owned(),
        s if s < 1.0 && s > 0.99 => ">99 %".to_owned(),
        s => format!("{:.0} %", s * 100.0),
    }
}

/// A text cut to so many characters, with `…` for what is left out in its middle.
pub fn fitted(text: &str, width: usize) -> String {
    let n = text.chars().count();
    if n <= width {
        return text.to_owned();
    }
    let kept = width.saturating_sub(1);
    let head: String = text.chars().take(kept / 2).collect();
    let tail: String = text.chars().skip(n - (kept - kept / 2)).collect();
    format!("{head}…{tail}")
}

/// A text that cannot change what a terminal does: control characters are escaped.
pub fn safe(text: &str) -> String {
    String::from_utf8_lossy(&super::output::printable(text.as_bytes(), true)).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_true() {
        for (n, shown) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1 << 20, "1.0 MiB"),
            (1_048_575, "1.0 MiB"),
            (u64::MAX, "16777216.0 TiB"),
        ] {
            assert_eq!(bytes(n), shown);
        }
        for (seconds, shown) in [
            (0.0, "0 us"),
            (-1.0, "0 us"),
            (0.000_5, "500 us"),
            (0.0123, "12.3 ms"),
            (0.5, "500 ms"),
            (3.44, "3.4 s"),
            (125.0, "2m 5s"),
            (11_520.0, "3h 12m"),
            (352_800.0, "4d 2h"),
        ] {
            assert_eq!(span(seconds), shown);
        }
        assert_eq!(
            (count(0), count(999), count(1000), count(1_234_567)),
            ("0".into(), "999".into(), "1,000".into(), "1,234,567".into())
        );
        for (share, shown) in [(0.0, "0 %"), (0.001, "<1 %"), (0.345, "34 %"), (0.999, ">99 %"), (1.0, "100 %")] {
            assert_eq!(percent(share), shown);
        }
        assert_eq!((fitted("abcdef", 6), fitted("abcdefg", 6)), ("abcdef".into(), "ab…efg".into()));
        assert_eq!(safe("a\x1b[2Jb"), "a\\u{1b}[2Jb");
    }
}
