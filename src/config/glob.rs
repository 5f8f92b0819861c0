//! Patterns for locations: Go's `path.Match`, which desync uses for its configuration (formats.md 7.3), and the same with `**`.
//!
//! | in a pattern | matches |
//! |---|---|
//! | `*` | any characters but `/` |
//! | `**` | any characters ([`Stars::CrossSlashes`] only) |
//! | `?` | one character but `/` |
//! | `[a-z_]`, `[^a-z_]` | one character but `/` of the set, or not of it |
//! | `\x` | the character `x` |
//!
//! Invariant: matching takes time proportional to the lengths' product at the most, whatever the pattern.

/// What two stars in a row mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stars {
    /// The same as one, as in Go.
    StayInPart,
    /// Any characters, `/` too.
    CrossSlashes,
}

/// A pattern that has been read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Glob {
    pieces: Vec<Piece>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Char(char),
    AnyChar,
    Set { negated: bool, ranges: Vec<(char, char)> },
    Star,
    StarStar,
}

/// A pattern that is none: an open set, or nothing behind a backslash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a pattern: a [ without its ], or a \\ at the end")]
pub struct BadPattern;

impl Glob {
    /// Reads a pattern.
    ///
    /// # Errors
    /// A set is not closed, empty or has a range without an end; a backslash stands at the end.
    pub fn new(pattern: &str, stars: Stars) -> Result<Self, BadPattern> {
        let mut pieces = Vec::new();
        let mut chars = pattern.chars().peekable();
        while let Some(c) = chars.next() {
            pieces.push(match c {
                '*' => {
                    let mut n_stars = 1;
                    while chars.next_if_eq(&'*').is_some() {
                        n_stars += 1;
                    }
                    match stars {
                        Stars::CrossSlashes if n_stars > 1 => Piece::StarStar,
                        _ => Piece::Star,
                    }
                }
                '?' => Piece::AnyChar,
                '\\' => Piece::Char(chars.next().ok_or(BadPattern)?),
                '[' => {
                    let negated = chars.next_if_eq(&'^').is_some();
                    let mut ranges = Vec::new();
                    while ranges.is_empty() || chars.next_if_eq(&']').is_none() {
                        let low = bound(chars.next(), &mut chars)?;
                        let high = match chars.next_if_eq(&'-') {
                            Some(_) => bound(chars.next(), &mut chars)?,
                            None => low,
                        };
                        ranges.push((low, high));
                    }
                    Piece::Set { negated, ranges }
                }
                c => Piece::Char(c),
            });
        }
        Ok(Self { pieces })
    }

    /// Whether the whole text matches.
    pub fn matches(&self, text: &str) -> bool {
        // `reached[i]`: the pieces so far match the first i characters.
        let chars: Vec<char> = text.chars().collect();
        let mut reached = vec![false; chars.len() + 1];
        reached[0] = true;
        for piece in &self.pieces {
            let mut next = vec![false; chars.len() + 1];
            for i in 0..=chars.len() {
                let before = i > 0 && reached[i - 1];
                next[i] = match piece {
                    Piece::Star => reached[i] || (i > 0 && next[i - 1] && chars[i - 1] != '/'),
                    Piece::StarStar => reached[i] || (i > 0 && next[i - 1]),
                    one => before && one.matches_one(chars[i - 1]),
                };
            }
            reached = next;
        }
        reached[chars.len()]
    }
}

impl Piece {
    fn matches_one(&self, c: char) -> bool {
        match self {
            Self::Char(wanted) => c == *wanted,
            Self::AnyChar => c != '/',
            Self::Set { negated, ranges } => {
                c != '/' && ranges.iter().any(|(low, high)| (*low..=*high).contains(&c)) != *negated
            }
            Self::Star | Self::StarStar => false,
        }
    }
}

/// One end of a range in a set.
fn bound(c: Option<char>, rest: &mut impl Iterator<Item = char>) -> Result<char, BadPattern> {
    match c {
        None | Some('-' | ']') => Err(BadPattern),
        Some('\\') => rest.next().ok_or(BadPattern),
        Some(c) => Ok(c),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_those_of_go() {
        for (pattern, text, matches) in [
            ("", "", true),
            ("abc", "abc", true),
            ("*", "abc", true),
            ("*c", "abc", true),
            ("a*", "ab/c", false),
            ("a*/b", "abc/b", true),
            ("a**/b", "abc/b", true),
            ("**", "a/b", false),
            ("a*b*c*d*e*/f", "axbxcxdxexxx/f", true),
            ("a*b*c*d*e*/f", "axbxcxdxe/xxx/f", false),
            ("a*b?c*x", "abxbbxdbxebxczzx", true),
            ("a*b?c*x", "abxbbxdbxebxczzy", false),
            ("ab[c]", "abc", true),
            ("ab[b-d]", "abc", true),
            ("ab[e-g]", "abc", false),
            ("ab[^c]", "abc", false),
            ("ab[^e-g]", "abc", true),
            ("a\\*b", "a*b", true),
            ("a\\*b", "ab", false),
            ("a?b", "aäb", true),
            ("a[^a]b", "aäb", true),
            ("a???b", "aäb", false),
            ("[a-ζ]*", "α", true),
            ("*[a-ζ]", "A", false),
            ("a?b", "a/b", false),
            ("a*b", "a/b", false),
            ("[\\]a]", "]", true),
            ("[\\-x]", "-", true),
            ("[x\\-]", "z", false),
            ("a[^x]b", "a/b", false),
            ("https://h/*/x", "https://h/a/x", true),
        ] {
            assert_eq!(Glob::new(pattern, Stars::StayInPart).unwrap().matches(text), matches, "{pattern} {text}");
        }
        for pattern in ["[", "[]a]", "[-]", "[x-]", "[-x]", "[a-b-c]", "[", "[^", "[^bc", "a[", "\\", "[\\"] {
            assert_eq!(Glob::new(pattern, Stars::StayInPart), Err(BadPattern), "{pattern}");
        }
    }

    #[test]
    fn two_stars_cross_slashes() {
        for (pattern, text, matches) in [
            ("https://h/**", "https://h/a/b", true),
            ("https://h/**/x", "https://h/a/b/x", true),
            ("https://h/**/x", "https://h/x", false),
            ("**", "", true),
            ("https://h/*", "https://h/a/b", false),
        ] {
            assert_eq!(Glob::new(pattern, Stars::CrossSlashes).unwrap().matches(text), matches, "{pattern} {text}");
        }
    }

    #[test]
    fn no_pattern_takes_long() {
        let glob = Glob::new(&"*a".repeat(200), Stars::StayInPart).unwrap();
        assert!(!glob.matches(&format!("{}b", "a".repeat(2000))));
    }
}
