//! The manual: man pages made of what defines the program, with prose in between; and completions for shells.
//!
//! * [`pages`] makes all pages. A verb's flags come from clap, mount options, store options and their defaults from their tables.
//! * [`prose`] is what people wrote: `man/src/NAME.SECTION.md`. A verb without any has a page all the same.
//! * [`roff`] turns prose into a page.
//!
//! The pages lie in `man/`; a test says when they are not what is made here, and runs every example in them.

pub mod prose;
pub mod roff;

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use super::args::Args;
use crate::config::store_options::{STORE_OPTIONS, Scope};
use crate::mount::options::{MOUNT_OPTIONS, MountOption};
use prose::Prose;
use roff::{bold, escaped, italic};

/// Arguments of `manual`.
#[derive(Debug, clap::Args)]
pub struct ManualArgs {
    /// The directory to write the pages to.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
pub struct CompletionsArgs {
    /// The shell.
    #[arg(value_name = "SHELL")]
    pub shell: Shell,
}

/// A man page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Its file: `caifs-mount.1`.
    pub file_name: String,
    /// Its source, for man(7).
    pub text: String,
}

/// `caifs manual`: writes the pages.
pub fn write(args: &ManualArgs) -> Result<()> {
    fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    for page in pages() {
        let path = args.out.join(&page.file_name);
        fs::write(&path, page.text).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// `caifs completions`: what a shell reads to complete our command lines.
pub fn completions(args: &CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Args::command(), "caifs", &mut script);
    Ok(io::stdout().write_all(&script)?)
}

/// All pages of the manual, by name.
pub fn pages() -> Vec<Page> {
    let mut caifs = Args::command();
    caifs.build();
    let verbs: Vec<&Command> = caifs.get_subcommands().filter(|verb| !verb.is_hide_set()).collect();
    let mut pages: Vec<Page> = verbs.iter().map(|verb| verb_page(verb)).collect();
    pages.push(program_page(&caifs, &verbs));
    pages.extend(prose::OTHERS.iter().map(other_page));
    pages.sort_by(|a, b| a.file_name.cmp(&b.file_name));
    pages
}

/// The page of a verb: its flags between description and the rest of the prose.
fn verb_page(verb: &Command) -> Page {
    let name = format!("caifs-{}", verb.get_name());
    let prose = prose::find(&format!("{name}.1"));
    let about = verb.get_about().map(ToString::to_string).unwrap_or_default();
    let mut text = head(&name, "1", &lower_first(about.trim_end_matches('.')));
    text.push_str(".SH SYNOPSIS\n");
    text.push_str(&match inner_verbs(verb)[..] {
        [] => synopsis(&format!("caifs {}", verb.get_name()), verb),
        ref inner => {
            let lines = inner.iter().map(|inner| synopsis(&inner_name(verb, inner), inner));
            lines.collect::<Vec<_>>().join(".br\n")
        }
    });
    match prose.and_then(|prose| prose.section("DESCRIPTION")) {
        Some(description) => text.push_str(&roff::render(description, &generated)),
        None => text.push_str(&format!(".SH DESCRIPTION\n{}\n", escaped(&about))),
    }
    for inner in inner_verbs(verb) {
        let about = inner.get_about().map(ToString::to_string).unwrap_or_default();
        text.push_str(&format!(".SH \"{}\"\n{}\n", inner_name(verb, inner).to_uppercase(), escaped(&about)));
        // What all verbs take stands below, once.
        let own = inner.clone().mut_args(|arg| match arg.is_global_set() || arg.get_id() == "help" {
            true => arg.hide(true),
            false => arg,
        });
        let lines = options_of(&own);
        text.push_str(lines.strip_prefix(".SH OPTIONS\n").unwrap_or(&lines));
    }
    text.push_str(&options_of(verb));
    text.push_str(&rest_of(prose, "1", &["DESCRIPTION"]));
    Page { file_name: format!("{name}.1"), text }
}

/// The verbs of a verb, such as those of `profile`.
fn inner_verbs(verb: &Command) -> Vec<&Command> {
    verb.get_subcommands().filter(|inner| !inner.is_hide_set() && inner.get_name() != "help").collect()
}

fn inner_name(verb: &Command, inner: &Command) -> String {
    format!("caifs {} {}", verb.get_name(), inner.get_name())
}

/// The page of the program: its verbs.
fn program_page(caifs: &Command, verbs: &[&Command]) -> Page {
    let prose = prose::find("caifs.1");
    let about = caifs.get_about().map(ToString::to_string).unwrap_or_default();
    let mut text = head("caifs", "1", &lower_first(about.trim_end_matches('.')));
    text.push_str(&format!(".SH SYNOPSIS\n{} {} {}\n", bold("caifs"), italic("VERB"), italic("ARGUMENTS")));
    if let Some(description) = prose.and_then(|prose| prose.section("DESCRIPTION")) {
        text.push_str(&roff::render(description, &generated));
    }
    text.push_str(".SH VERBS\n");
    for verb in verbs {
        let about = verb.get_about().map(ToString::to_string).unwrap_or_default();
        let page = format!("{}(1)", bold(&format!("caifs-{}", verb.get_name())));
        text.push_str(&format!(".TP\n{page}\n{}\n", escaped(&about)));
    }
    text.push_str(&options_of(caifs));
    text.push_str(&rest_of(prose, "1", &["DESCRIPTION"]));
    Page { file_name: "caifs.1".to_owned(), text }
}

/// A page that is prose, with tables in it.
fn other_page(prose: &Prose) -> Page {
    let (name, section) = prose.name.rsplit_once('.').unwrap_or((prose.name, "7"));
    let about = prose.section("NAME").map(|text| text.lines().skip(1).collect::<String>()).unwrap_or_default();
    let mut text = head(name, section, about.trim());
    text.push_str(&rest_of(Some(prose), section, &["NAME"]));
    Page { file_name: prose.name.to_owned(), text }
}

fn head(name: &str, section: &str, about: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let title = escaped(&name.to_uppercase());
    format!(
        ".\\\" Made by `caifs manual` of the program and man/src: do not edit.\n\
         .TH \"{title}\" \"{section}\" \"\" \"caifs {version}\" \"caifs manual\"\n\
         .SH NAME\n{} \\- {}\n",
        escaped(name),
        escaped(about)
    )
}

fn synopsis(name: &str, verb: &Command) -> String {
    let mut line = name.split(' ').map(bold).collect::<Vec<_>>().join(" ");
    let is_flag = |arg: &&clap::Arg| !arg.is_positional() && !arg.is_hide_set();
    if verb.get_arguments().filter(is_flag).any(|arg| !arg.is_required_set()) {
        line.push_str(&format!(" [{}]", italic("OPTIONS")));
    }
    let value = |arg: &clap::Arg| {
        let names = arg.get_value_names().unwrap_or_default();
        names.iter().map(|name| italic(name)).collect::<Vec<_>>().join(" ")
    };
    for arg in verb.get_arguments().filter(is_flag).filter(|arg| arg.is_required_set()) {
        let flag = arg.get_long().map(|long| format!("--{long}")).unwrap_or_default();
        line.push_str(&format!(" {} {}", bold(&flag), value(arg)));
    }
    for arg in verb.get_positionals().filter(|arg| !arg.is_hide_set()) {
        let is_list = arg.get_num_args().is_some_and(|range| range.max_values() > 1);
        let dots = if is_list { "\\&..." } else { "" };
        line.push_str(&match arg.is_required_set() {
            true => format!(" {}{dots}", value(arg)),
            false => format!(" [{}{dots}]", value(arg)),
        });
    }
    line.push('\n');
    line
}

/// The sections with arguments and flags.
fn options_of(command: &Command) -> String {
    let mut bytes = Vec::new();
    // Writing into memory cannot fail.
    let _ = Man::new(command.clone()).render_options_section(&mut bytes);
    // Without what stands in front of whole pages: a string for the apostrophe, which has a name of its own.
    let lines = String::from_utf8_lossy(&bytes).replace("\\*(Aq", "\\(aq");
    let lines = lines.lines().filter(|line| !line.starts_with(".ie ") && !line.starts_with(".el "));
    lines.map(|line| format!("{}\n", roff::ascii(line))).collect()
}

/// The sections of prose but for some, and what every page has.
fn rest_of(prose: Option<&Prose>, section: &str, without: &[&str]) -> String {
    let mut text = String::new();
    let mut has_see_also = false;
    let mut has_exit_status = false;
    for (title, source) in prose.iter().flat_map(|prose| prose.sections()) {
        if !without.contains(&title) {
            has_see_also |= title == "SEE ALSO";
            has_exit_status |= title == "EXIT STATUS";
            text.push_str(&roff::render(source, &generated));
        }
    }
    if !has_exit_status && section == "1" {
        text.push_str(&roff::render(prose::EXIT_STATUS, &generated));
    }
    if !has_see_also {
        text.push_str(&roff::render(prose::SEE_ALSO, &generated));
    }
    text
}

/// What stands for `{{name}}` in prose.
fn generated(name: &str) -> Option<String> {
    match name {
        "mount-options" => Some(mount_options(|_| true)),
        "mount-keys" => Some(mount_options(|option| {
            option.name != "config" && crate::config::store_options::place_of(option.name).is_none()
        })),
        "store-options" => Some(store_options()),
        "locations" => Some(roff::render(prose::LOCATIONS, &|_| None)),
        _ => None,
    }
}

fn mount_options(is_shown: impl Fn(&MountOption) -> bool) -> String {
    let mut text = String::new();
    for option in MOUNT_OPTIONS.iter().filter(|option| is_shown(option)) {
        let value = match option.placeholder {
            Some(placeholder) => format!("={}", italic(placeholder)),
            None => format!("[={}|{}]", bold("yes"), bold("no")),
        };
        let again = if option.repeatable { " May be given several times." } else { "" };
        let help = escaped(option.help);
        text.push_str(&format!(".TP\n{}{value}\n{help}.{again}\n", bold(option.name)));
    }
    text
}

fn store_options() -> String {
    let mut text = String::new();
    for option in STORE_OPTIONS {
        let stores = match option.scope {
            Scope::Any => "",
            Scope::Tls => " (Stores with TLS: web servers, registries, S3, Google Cloud Storage.)",
            Scope::Http => " (Web servers and registries.)",
            Scope::S3 => " (S3.)",
            Scope::Gcs => " (Google Cloud Storage.)",
            Scope::Oci => " (Registries.)",
            Scope::Ssh => " (sftp:// and ssh://.)",
        };
        let default = option.default.map(|default| format!(" Default: {default}.")).unwrap_or_default();
        let body = format!("{}. Takes {}.{default}{stores}", option.help, option.kind.expected());
        text.push_str(&format!(".TP\n{}\n{}\n", bold(option.name), escaped(&body)));
    }
    text
}

fn lower_first(text: &str) -> String {
    let mut chars = text.chars();
    match (chars.next(), chars.clone().next()) {
        // A name in capitals stays one.
        (Some(first), Some(second)) if second.is_lowercase() || second == ' ' => {
            first.to_lowercase().chain(chars).collect()
        }
        _ => text.to_owned(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_has_a_page_and_every_flag_stands_in_it() {
        let pages = pages();
        let mut caifs = Args::command();
        caifs.build();
        for verb in caifs.get_subcommands().filter(|verb| !verb.is_hide_set()) {
            let file_name = format!("caifs-{}.1", verb.get_name());
            let page = pages.iter().find(|page| page.file_name == file_name).unwrap_or_else(|| panic!("{file_name}"));
            for arg in verb.get_arguments().filter(|arg| !arg.is_hide_set()) {
                let Some(long) = arg.get_long() else { continue };
                assert!(page.text.contains(&bold(&format!("--{long}"))), "{file_name}: --{long}");
            }
            let typed = format!(".SH SYNOPSIS\n{} {}", bold("caifs"), bold(verb.get_name()));
            assert!(page.text.contains(&typed), "{file_name}: {typed}");
            for inner in inner_verbs(verb) {
                let heading = format!(".SH \"{}\"\n", inner_name(verb, inner).to_uppercase());
                assert!(page.text.contains(&heading), "{file_name}: {}", inner.get_name());
                for long in inner.get_arguments().filter(|arg| !arg.is_hide_set()).filter_map(clap::Arg::get_long) {
                    assert!(
                        page.text.contains(&bold(&format!("--{long}"))),
                        "{file_name}: {} --{long}",
                        inner.get_name()
                    );
                }
            }
        }
        let text = |name: &str| pages.iter().find(|page| page.file_name == name).unwrap().text.clone();
        for option in MOUNT_OPTIONS {
            assert!(text("mount.caifs.8").contains(&bold(option.name)), "{}", option.name);
        }
        for option in STORE_OPTIONS {
            assert!(text("caifs.toml.5").contains(&bold(option.name)), "{}", option.name);
        }
    }

    #[test]
    fn nothing_is_left_unfilled() {
        for page in pages() {
            assert!(!page.text.contains("{{"), "{}", page.file_name);
        }
    }
}
