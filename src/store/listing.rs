//! What servers tell of a directory: pages as people see them, and JSON as nginx writes it (`autoindex_format json`), which is also what
//! our index server answers.
//!
//! | server | answer |
//! |---|---|
//! | nginx, Apache, lighttpd, Caddy, Python | a page with a link for each name |
//! | nginx with `autoindex_format json`, caifs | `[{"name":"x","type":"file","mtime":"Sun, 06 Nov 1994 08:49:37 GMT","size":7}]` |
//!
//! [`to_json`] writes what [`from_json`] reads, with the file's `etag` besides. Of a page only links are taken that lead to a name right
//! below it: what else it links to (above, elsewhere, or itself in another order) is no file of the directory.
//!
//! Invariant: a name is never empty, `.`, `..`, and has no `/` in it; nothing here panics, whatever the server says.

use std::collections::BTreeMap;
use std::time::SystemTime;

use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimePrinter;
use percent_encoding::percent_decode_str;
use serde::{Deserialize, Serialize};
use url::Url;

use super::files::{FileVersion, Listed};
use super::http::exchange::http_date;

/// The most names of one directory.
pub const MAX_LISTED: usize = 100_000;

/// The most bytes of a listing: some 300 a name.
pub const MAX_LISTING_BYTES: u64 = 32 << 20;

/// A name in JSON.
#[derive(Debug, Serialize, Deserialize)]
struct Row {
    name: String,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mtime: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    etag: Option<String>,
}

/// Reads JSON; what is neither file nor directory, or has no proper name, is left out.
///
/// # Errors
/// It is not of the form above, or has more than [`MAX_LISTED`] names.
pub fn from_json(text: &[u8]) -> Result<Vec<Listed>, String> {
    let rows: Vec<Row> =
        serde_json::from_slice(text).map_err(|error| format!("its listing is of no known form: {error}"))?;
    let listed = rows.into_iter().filter_map(|row| {
        let is_directory = match row.kind.as_str() {
            "file" => false,
            "directory" => true,
            _ => return None,
        };
        let mtime = row.mtime.as_deref().and_then(http_date);
        let version = row.etag.map(FileVersion);
        is_name(&row.name).then_some(Listed { name: row.name, is_directory, size: row.size, mtime, version })
    });
    bounded(listed)
}

/// Writes JSON. The version of a file becomes its `etag`.
pub fn to_json(listed: &[Listed]) -> Vec<u8> {
    let rows: Vec<Row> = listed
        .iter()
        .map(|listed| Row {
            name: listed.name.clone(),
            kind: if listed.is_directory { "directory" } else { "file" }.to_owned(),
            mtime: listed.mtime.and_then(http_text),
            size: listed.size,
            etag: listed.version.as_ref().map(|version| version.0.clone()),
        })
        .collect();
    // Strings and numbers always can be written.
    serde_json::to_vec(&rows).unwrap_or_default()
}

/// Reads a page that came from `base`, which ends with `/`. A page tells neither sizes nor times that programs could read.
///
/// # Errors
/// It has no link that a listing has, not even one to the directory above; or more than [`MAX_LISTED`] names.
pub fn from_html(page: &str, base: &Url) -> Result<Vec<Listed>, String> {
    // A name that is linked twice, as by its picture, is one.
    let mut found: BTreeMap<String, bool> = BTreeMap::new();
    let mut is_listing = page.contains("Index of ") || page.contains("Directory listing for ");
    for href in hrefs(page) {
        let Ok(target) = base.join(&unescaped(href)) else { continue };
        let is_above = base.path().len() > target.path().len() && base.path().starts_with(target.path());
        is_listing |= is_above && target.origin() == base.origin();
        if let Some((name, is_directory)) = name_below(base, &target) {
            is_listing = true;
            *found.entry(name).or_default() |= is_directory;
            if found.len() > MAX_LISTED {
                return Err(too_many());
            }
        }
    }
    match is_listing {
        true => Ok(found
            .into_iter()
            .map(|(name, is_directory)| Listed { name, is_directory, size: None, mtime: None, version: None })
            .collect()),
        false => Err("the page is not the listing of a directory".to_owned()),
    }
}

/// Whether a text can be the name of a file.
pub fn is_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\0'])
}

/// Collects names up to the limit.
///
/// # Errors
/// There are more.
pub fn bounded(listed: impl Iterator<Item = Listed>) -> Result<Vec<Listed>, String> {
    let listed: Vec<Listed> = listed.take(MAX_LISTED + 1).collect();
    match listed.len() > MAX_LISTED {
        true => Err(too_many()),
        false => Ok(listed),
    }
}

fn too_many() -> String {
    format!("it has more than {MAX_LISTED} names")
}

/// A time as HTTP writes it (RFC 9110, 5.6.7), to the second.
fn http_text(time: SystemTime) -> Option<String> {
    let timestamp = Timestamp::try_from(time).ok()?;
    DateTimePrinter::new().timestamp_to_rfc9110_string(&timestamp).ok()
}

/// The values of all `href` attributes.
fn hrefs(page: &str) -> impl Iterator<Item = &str> {
    let mut rest = page;
    std::iter::from_fn(move || {
        loop {
            let at = rest.as_bytes().windows(5).position(|five| five.eq_ignore_ascii_case(b"href="))?;
            // Behind five bytes of ASCII a text can be cut.
            rest = rest.get(at + 5..)?;
            let value = match rest.chars().next()? {
                quote @ ('"' | '\'') => rest[1..].split(quote).next()?,
                _ => rest.split([' ', '>', '\t', '\n', '\r']).next()?,
            };
            if !value.is_empty() {
                return Some(value);
            }
        }
    })
}

/// The five characters that a link has to write otherwise, as servers do it.
fn unescaped(href: &str) -> String {
    href.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&#39;", "'")
        .replace("&#34;", "\"")
        .replace("&amp;", "&")
}

/// The name right below `base` that a link leads to, and whether it is one of a directory.
fn name_below(base: &Url, target: &Url) -> Option<(String, bool)> {
    if target.origin() != base.origin() || target.query().is_some() || target.fragment().is_some() {
        return None;
    }
    let below = target.path().strip_prefix(base.path())?;
    let (segment, is_directory) = match below.strip_suffix('/') {
        Some(segment) => (segment, true),
        None => (below, false),
    };
    let name = percent_decode_str(segment).decode_utf8().ok()?.into_owned();
    (!segment.contains('/') && is_name(&name)).then_some((name, is_directory))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn base() -> Url {
        Url::parse("http://h:8080/idx/sub/").unwrap()
    }

    fn names(page: &str) -> Vec<(String, bool)> {
        from_html(page, &base()).unwrap().into_iter().map(|listed| (listed.name, listed.is_directory)).collect()
    }

    #[test]
    fn pages_of_many_servers_are_read() {
        let nginx = "<html><head><title>Index of /idx/sub/</title></head><body><h1>Index of /idx/sub/</h1><hr><pre>\
            <a href=\"../\">../</a>\n<a href=\"dir/\">dir/</a>  01-Jan-2024 -\n\
            <a href=\"a%20b%25.caibx\">a b%.caibx</a> 01-Jan-2024 144\n<a href=\"x&amp;y.catar\">x&amp;y.catar</a></pre>";
        assert_eq!(names(nginx), [("a b%.caibx".into(), false), ("dir".into(), true), ("x&y.catar".into(), false)]);
        let apache = "<title>Index of /idx/sub</title><th><a href=\"?C=N;O=D\">Name</a></th>\
            <a href=\"/idx/\">Parent Directory</a><A HREF=x.caibx>x</A><img src=\"/icons/x.png\">";
        assert_eq!(names(apache), [("x.caibx".into(), false)]);
        let caddy = "<a href='./one.caidx'>one</a><a href=\"./dir/\">dir</a><a href=\"..\">up</a>";
        assert_eq!(names(caddy), [("dir".into(), true), ("one.caidx".into(), false)]);
        let absolute = "<a href=\"/idx/sub/z.catar\">z</a><a href=\"http://h:8080/idx/sub/y.catar\">y</a>";
        assert_eq!(names(absolute), [("y.catar".into(), false), ("z.catar".into(), false)]);
        assert_eq!(names("<h1>Index of /idx/sub/</h1><a href=\"../\">../</a>"), []);
        assert_eq!(names("<h1>Directory listing for /</h1><ul></ul>"), []);
    }

    #[test]
    fn links_that_lead_elsewhere_are_no_files() {
        let page = "Index of <a href=\"http://other/idx/sub/x.caibx\"><a href=\"//h:8081/idx/sub/x.caibx\">\
            <a href=\"../x.caibx\"><a href=\"deep/x.caibx\"><a href=\"x.caibx?download\"><a href=\"#top\"><a href=\"\">\
            <a href=\"%2e%2e\"><a href=\"a%2fb.caibx\"><a href=\"%ff.caibx\"><a href=\"javascript:x\"><a href=\"mailto:x\">";
        assert_eq!(names(page), []);
        for other in ["", "hello", "<a href=\"https://elsewhere/\">x</a>", "<a href=\"#x\">", "href="] {
            assert!(from_html(other, &base()).is_err(), "{other}");
        }
    }

    #[test]
    fn json_is_read_and_written() {
        let text = br#"[
            { "name":"dir", "type":"directory", "mtime":"Wed, 01 Jan 2020 00:00:00 GMT" },
            { "name":"x.caibx", "type":"file", "mtime":"Sun, 06 Nov 1994 08:49:37 GMT", "size":144 },
            { "name":"pipe", "type":"other" }, { "name":"a/b", "type":"file" }, { "name":"..", "type":"directory" }
        ]"#;
        let listed = from_json(text).unwrap();
        assert_eq!(listed.iter().map(|listed| listed.name.as_str()).collect::<Vec<_>>(), ["dir", "x.caibx"]);
        assert!(listed[0].is_directory && !listed[1].is_directory);
        assert_eq!((listed[1].size, listed[1].version.clone()), (Some(144), None));
        assert_eq!(listed[1].mtime.unwrap(), http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap());
        let mut with_version = listed;
        with_version[1].version = Some(FileVersion("\"a\"".to_owned()));
        assert_eq!(from_json(&to_json(&with_version)).unwrap(), with_version);
        for wrong in ["", "{}", "[1]", "[{\"name\":\"x\"}]", "<html>"] {
            assert!(from_json(wrong.as_bytes()).is_err(), "{wrong}");
        }
        assert_eq!(from_json(b"[]").unwrap(), []);
    }

    #[test]
    fn no_directory_is_without_end() {
        let one =
            |n: usize| Listed { name: n.to_string(), is_directory: false, size: None, mtime: None, version: None };
        assert_eq!(bounded((0..MAX_LISTED).map(one)).unwrap().len(), MAX_LISTED);
        assert!(bounded((0..).map(one)).unwrap_err().contains("more than"));
    }

    proptest! {
        #[test]
        fn whatever_a_server_says_gives_names_or_an_error(page in "(<a |href=|HREF=|\"|'|[./%a-z&;?#é ]|%2f|%2e|Index of |>){0,60}") {
            if let Ok(listed) = from_html(&page, &base()) {
                prop_assert!(listed.iter().all(|listed| is_name(&listed.name)));
            }
            if let Ok(listed) = from_json(page.as_bytes()) {
                prop_assert!(listed.iter().all(|listed| is_name(&listed.name)));
            }
        }

        #[test]
        fn any_names_come_back_from_a_page_and_from_json(wanted in proptest::collection::btree_set("[^/\u{0}]{1,12}", 0..20)) {
            let wanted: Vec<String> = wanted.into_iter().filter(|name| is_name(name)).collect();
            let links: Vec<String> = wanted.iter().map(|name| {
                let href = percent_encoding::utf8_percent_encode(name, percent_encoding::NON_ALPHANUMERIC);
                format!("<a href=\"{href}\">x</a>")
            }).collect();
            let page = format!("Index of /{}", links.concat());
            let read: Vec<String> = from_html(&page, &base()).unwrap().into_iter().map(|listed| listed.name).collect();
            prop_assert_eq!(&read, &wanted);
            let rows: Vec<Listed> = wanted.iter().map(|name| Listed {
                name: name.clone(), is_directory: false, size: Some(1), mtime: None, version: None,
            }).collect();
            prop_assert_eq!(from_json(&to_json(&rows)).unwrap(), rows);
        }
    }
}
