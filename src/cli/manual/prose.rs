//! The texts in `man/src`, by the page they belong to.

/// The prose of a page.
#[derive(Debug)]
pub struct Prose {
    /// The page: `caifs-mount.1`.
    pub name: &'static str,
    text: &'static str,
}

impl Prose {
    /// The sections in their order: each with its title, and its text from the heading on.
    pub fn sections(&self) -> Vec<(&'static str, &'static str)> {
        let mut starts: Vec<usize> = Vec::new();
        let (mut at, mut in_block) = (0, false);
        for line in self.text.split_inclusive('\n') {
            in_block ^= line.starts_with("```");
            if line.starts_with("# ") && !in_block {
                starts.push(at);
            }
            at += line.len();
        }
        let ends = starts.iter().skip(1).copied().chain([self.text.len()]);
        let sections = starts.iter().zip(ends).map(|(start, end)| &self.text[*start..end]);
        sections.map(|text| (text.lines().next().unwrap_or_default()[2..].trim(), text)).collect()
    }

    /// The text of a section, from its heading on.
    pub fn section(&self, title: &str) -> Option<&'static str> {
        self.sections().into_iter().find(|(found, _)| *found == title).map(|(_, text)| text)
    }
}

/// The prose of a verb's page, or the program's.
pub fn find(name: &str) -> Option<&'static Prose> {
    VERBS.iter().find(|prose| prose.name == name)
}

macro_rules! prose {
    ($($name:literal),* $(,)?) => {
        &[$(Prose { name: $name, text: include_str!(concat!("../../../man/src/", $name, ".md")) }),*]
    };
}

/// Pages of the program and its verbs. What stands here for a verb that there is not is not used.
pub const VERBS: &[Prose] = prose![
    "caifs.1",
    "caifs-abort.1",
    "caifs-cat.1",
    "caifs-chunk-server.1",
    "caifs-completions.1",
    "caifs-config.1",
    "caifs-demo.1",
    "caifs-index-server.1",
    "caifs-info.1",
    "caifs-list-chunks.1",
    "caifs-ls.1",
    "caifs-make.1",
    "caifs-map.1",
    "caifs-mount.1",
    "caifs-profile.1",
    "caifs-reload.1",
    "caifs-s3-upgrade.1",
    "caifs-sign.1",
    "caifs-status.1",
    "caifs-tar.1",
    "caifs-top.1",
    "caifs-umount.1",
    "caifs-verify-index.1",
    "caifs-verify-signature.1",
    "caifs-warm.1",
];

/// Pages of other things than verbs.
pub const OTHERS: &[Prose] = prose!["mount.caifs.8", "caifs.toml.5", "caifs-profile.5"];

/// What ends the page of a verb that says nothing else.
pub const EXIT_STATUS: &str =
    "# EXIT STATUS\n\n0 on success, 1 on failure, with one line on standard error that says why.\n";

/// What ends a page that says nothing else.
pub const SEE_ALSO: &str = "# SEE ALSO\n\n`caifs`(1), `caifs-mount`(1), `caifs.toml`(5)\n";

/// Where things may lie.
pub const LOCATIONS: &str = include_str!("../../../man/src/locations.md");
