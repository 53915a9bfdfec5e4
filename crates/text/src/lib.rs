//! Safe display of untrusted names in messages, commands and file names.
//!
//! A file name may contain terminal control sequences, newlines that fake a line of output, or marks that reverse the
//! writing direction. [`escaped`] and [`shown`] escape such characters.
#![forbid(unsafe_code)]

mod nearest;

pub use nearest::nearest;

use std::borrow::Cow;
use std::fmt::Write;
use std::path::Path;

use sha2::{Digest, Sha256};

/// Maximum number of entries of a list that are shown.
pub const LISTED: usize = 20;

/// Whether `c` is escaped: control characters, line separators, bidirectional marks and overrides, and zero-width spaces.
/// Joiners are kept, as some scripts and emoji need them.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'
            | '\u{2066}'..='\u{2069}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}')
}

fn push_escaped(out: &mut String, c: char) {
    // Writing to a String cannot fail.
    let _ = match c {
        '\n' | '\r' | '\t' => write!(out, "{}", c.escape_default()),
        c if c.is_ascii() => write!(out, "\\x{:02x}", u32::from(c)),
        c => write!(out, "\\u{{{:x}}}", u32::from(c)),
    };
}

fn escape(text: &str, keep: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.chars().any(|c| is_unsafe(c) && !keep(c)) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_unsafe(c) && !keep(c) { push_escaped(&mut out, c) } else { out.push(c) }
    }
    Cow::Owned(out)
}

/// `text` as a single line that is safe for a terminal, with escapes such as `\n`, `\x1b` or `\u{202e}`.
pub fn escaped(text: &str) -> Cow<'_, str> {
    escape(text, |_| false)
}

/// [`escaped`] for multi-line text: keeps newlines.
pub fn escaped_lines(text: &str) -> Cow<'_, str> {
    escape(text, |c| c == '\n')
}

/// A path for a message: [`escaped`], with invalid UTF-8 bytes as `\xe9`.
pub fn shown(path: impl AsRef<Path>) -> String {
    let mut out = String::new();
    for chunk in path.as_ref().as_os_str().as_encoded_bytes().utf8_chunks() {
        out += &escaped(chunk.valid());
        chunk.invalid().iter().for_each(|byte| {
            let _ = write!(out, "\\x{byte:02x}");
        });
    }
    out
}

/// A path as a word of a shell command, quoted if necessary.
pub fn quoted(path: impl AsRef<Path>) -> String {
    let bytes = path.as_ref().as_os_str().as_encoded_bytes();
    // A leading dash would make it a flag.
    if bytes.starts_with(b"-") { quoted_bytes(&[b"./", bytes].concat()) } else { quoted_bytes(bytes) }
}

/// [`quoted`] for a value that is not a path and follows its flag: `--class=NAME`.
pub fn quoted_value(text: &str) -> String {
    quoted_bytes(text.as_bytes())
}

fn quoted_bytes(bytes: &[u8]) -> String {
    if let Ok(text) = str::from_utf8(bytes)
        && !text.chars().any(is_unsafe)
    {
        return quoted_text(text);
    }
    // bash, zsh and POSIX 2024 support escapes in $'...'.
    let mut out = "$'".to_owned();
    let escape = |out: &mut String, bytes: &[u8]| {
        bytes.iter().for_each(|byte| {
            let _ = write!(out, "\\{byte:03o}");
        });
    };
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\'' | '\\' => out.extend(['\\', c]),
                c if !is_unsafe(c) => out.push(c),
                c => escape(&mut out, c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        escape(&mut out, chunk.invalid());
    }
    out + "'"
}

/// Quotes text without control characters for a shell.
fn quoted_text(text: &str) -> String {
    if cfg!(windows) {
        let bare = |c: char| c.is_alphanumeric() || "-_.:=/\\+,@".contains(c);
        return if !text.is_empty() && text.chars().all(bare) {
            text.to_owned()
        } else {
            format!("\"{text}\"")
        };
    }
    // It fails only for NUL, which no path contains.
    shlex::try_quote(text).map_or_else(|_| escaped(text).into_owned(), Cow::into_owned)
}

/// The first `max` items, joined, and the number of the others.
pub fn listed<S: AsRef<str>>(items: &[S], max: usize) -> String {
    let mut text = items.iter().take(max).map(AsRef::as_ref).collect::<Vec<_>>().join(", ");
    if items.len() > max {
        // Writing to a String cannot fail.
        let _ = write!(text, " and {} more", thousands(items.len() - max));
    }
    text
}

/// A count with its noun: `1 image`, `1,234 images`.
pub fn counted(n: impl Into<Integer>, noun: &str) -> String {
    let n = n.into();
    format!("{} {noun}{}", thousands(n), if n.0 == 1 { "" } else { "s" })
}

/// A non-negative integer of any of the types that count things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Integer(u64);

impl From<u64> for Integer {
    fn from(n: u64) -> Self {
        Self(n)
    }
}

impl From<usize> for Integer {
    fn from(n: usize) -> Self {
        Self(n as u64)
    }
}

/// Formats with thousands separators: `1,234,567`.
pub fn thousands(n: impl Into<Integer>) -> String {
    let digits = n.into().0.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `name` limited to `max` bytes, for file systems: a longer name is cut at a character boundary and ends with a hash of the
/// full name, so that different names stay distinct.
///
/// # Panics
/// If `max` is below 16.
pub fn capped(name: &str, max: usize) -> Cow<'_, str> {
    assert!(max >= 16);
    if name.len() <= max {
        return Cow::Borrowed(name);
    }
    let hash: String = Sha256::digest(name).iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let kept = name.floor_char_boundary(max - hash.len() - 1);
    Cow::Owned(format!("{}-{hash}", &name[..kept]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_sequences_in_names_are_escaped() {
        for (name, expected) in [
            ("plain name.png", "plain name.png"),
            ("né à 東京 👩\u{200d}🎨.png", "né à 東京 👩\u{200d}🎨.png"),
            ("a\x1b[31mred\x07", "a\\x1b[31mred\\x07"),
            ("a\nb\r\tc", "a\\nb\\r\\tc"),
            ("gnp.\u{202e}exe", "gnp.\\u{202e}exe"),
            ("\u{9b}31m\u{7f}\u{2028}\u{2066}x\u{feff}", "\\u{9b}31m\\x7f\\u{2028}\\u{2066}x\\u{feff}"),
        ] {
            assert_eq!(escaped(name), expected);
            assert_eq!(shown(name), expected);
        }
        assert_eq!(escaped_lines("one\ntwo\x1b"), "one\ntwo\\x1b");
    }

    #[cfg(unix)]
    #[test]
    fn invalid_utf8_names_stay_distinct() {
        use std::os::unix::ffi::OsStrExt;
        let name = |bytes: &'static [u8]| std::ffi::OsStr::from_bytes(bytes);
        assert_eq!(shown(name(b"caf\xe9\n")), "caf\\xe9\\n");
        assert_eq!(quoted(name(b"caf\xe9's")), "$'caf\\351\\'s'");
    }

    #[cfg(unix)]
    #[test]
    fn quoted_names_survive_a_shell() {
        assert_eq!(quoted("runs/run-001"), "runs/run-001");
        assert_eq!(quoted("-x"), "./-x");
        for name in ["my photos", "it's", "a$HOME`ls`", "*", "a\nb\x1b[1m", "say \"hi\"", "\\t", "é\u{202e}'"]
        {
            let script = format!("printf %s {}", quoted(name));
            let run = std::process::Command::new("bash").args(["-c", &script]).output();
            // Skip the test without bash.
            let Ok(run) = run else { return };
            assert_eq!(String::from_utf8(run.stdout).unwrap(), name, "{script}");
        }
    }

    #[test]
    fn long_names_are_cut_at_character_boundaries_and_stay_distinct() {
        assert_eq!(capped("short", 16), "short");
        let (a, b) = ("é".repeat(200) + "a", "é".repeat(200) + "b");
        for max in 16..60 {
            let (a, b) = (capped(&a, max), capped(&b, max));
            assert!(a.len() <= max && a.len() >= max - 1 && a != b, "{a} {b}");
        }
    }

    #[test]
    fn long_lists_end_with_a_count() {
        let items: Vec<String> = (0..5000).map(|i| i.to_string()).collect();
        assert_eq!(listed(&items, 3), "0, 1, 2 and 4,997 more");
        assert_eq!(listed(&items[..2], 3), "0, 1");
        assert_eq!([0u64, 999, 1000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
    }
}
