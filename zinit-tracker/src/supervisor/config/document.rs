//! The text of a service file: zinit's fields, our additions, and what is wrong with them where.

use std::{
    collections::BTreeMap,
    fmt,
    marker::PhantomData,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::signal::Signal;
use serde::{Deserialize, Deserializer, de};
use serde_saphyr::{Location, Spanned};

use super::{
    super::definition::{
        Definition, KeepPattern, KillMode, Limit, LogMode, RESOURCES, RestartLimit, RestartPolicy, RestartWhen,
    },
    name::fault,
};
use crate::stop::signal_named;

/// Within which time restarts are counted if the file does not say.
const DEFAULT_WINDOW: Duration = Duration::from_secs(60);

/// The longest time that can be written: a hundred years, which no clock overflows on.
const MAX_SECONDS: f64 = 100.0 * 365.25 * 86400.0;

/// The fields of a file, for those who misspell one. Those in a mapping follow its name and a dot.
const FIELDS: [&str; 22] = [
    "exec",
    "test",
    "oneshot",
    "shutdown_timeout",
    "after",
    "signal",
    "signal.stop",
    "log",
    "env",
    "dir",
    "kill_mode",
    "kill_after",
    "keep",
    "restart",
    "restart.policy",
    "restart.delay",
    "restart.max_delay",
    "restart.limit",
    "restart.within",
    "user",
    "group",
    "limits",
];

/// A place in a service file and what is wrong there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    /// Line, from 1; 0: the file as a whole.
    pub line: u64,
    /// Column in characters, from 1.
    pub column: u64,
    /// The field, such as `restart.delay`; empty if it is none in particular.
    pub field: String,
    /// What is wrong.
    pub message: String,
}

impl Complaint {
    fn new(location: Location, field: &str, message: impl Into<String>) -> Self {
        Self {
            line: location.line(),
            column: location.column(),
            field: plain(field),
            message: plain(&message.into()),
        }
    }

    /// About the file as a whole.
    fn whole(message: impl Into<String>) -> Self {
        Self {
            line: 0,
            column: 0,
            field: String::new(),
            message: message.into(),
        }
    }
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "line {}, column {}: ", self.line, self.column)?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)
    }
}

/// A line of text: keys and values that it quotes may have anything in them.
fn plain(text: &str) -> String {
    let plain = |c: char| {
        if c.is_control() {
            c.escape_default().collect()
        } else {
            c.to_string()
        }
    };
    text.chars().map(plain).collect()
}

/// A service file that was understood.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// What it defines.
    pub definition: Definition,
    /// Fields that nobody knows, settings without effect, a command that cannot be split. zinit loads such files too.
    pub warnings: Vec<Complaint>,
}

/// Reads the text of a service file. Relative working directories are relative to `base`, the directory of the file.
///
/// # Errors
///
/// The first thing that is wrong.
pub fn parse(text: &str, base: &Path) -> Result<Document, Complaint> {
    let raw: Raw = read(text)?;
    let mut warnings = unknown_fields(text)?;
    let definition = raw.definition(base, &mut warnings)?;
    Ok(Document { definition, warnings })
}

/// Reads the text of a service file as it is, without asking what it means.
///
/// # Errors
///
/// It is not YAML.
pub(super) fn parse_value(text: &str) -> Result<serde_json::Value, Complaint> {
    read(text)
}

fn read<'de, T: Deserialize<'de>>(text: &'de str) -> Result<T, Complaint> {
    let options = serde_saphyr::options! {
        // `env: {EMPTY: null}` is the text, as for zinit.
        null_as_string: true,
        with_snippet: false,
        budget: serde_saphyr::budget! { max_documents: 2, max_aliases: 64, max_depth: 16 },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 256 },
    };
    let mut field = String::new();
    let result = serde_saphyr::with_deserializer_from_str_with_options(text, options, |deserializer| {
        serde_path_to_error::deserialize(deserializer).map_err(|error| {
            field = path(error.path());
            error.into_inner()
        })
    });
    result.map_err(|error| {
        let location = error.location().unwrap_or(Location::UNKNOWN);
        Complaint::new(location, &field, message(&error))
    })
}

/// The field that an error is about, as far as it is known: `value` is what wraps a value together with its place, and
/// keys of the operator's own are not tracked.
fn path(path: &serde_path_to_error::Path) -> String {
    let text = path.to_string();
    let text = text.split('?').next().unwrap_or_default();
    text.strip_suffix(".value")
        .unwrap_or(text)
        .trim_end_matches('.')
        .to_owned()
}

/// What an error says, without the place, which we put in front, and without the library's own terms.
fn message(error: &serde_saphyr::Error) -> String {
    match error {
        serde_saphyr::Error::DuplicateMappingKey { key: Some(key), .. } => format!("{key} is there twice"),
        serde_saphyr::Error::MultipleDocuments { .. } => {
            "one file is one document: there is another one here".to_owned()
        }
        error => {
            let text = error.to_string();
            let text = text.lines().next().unwrap_or_default();
            match text.rfind(" at line ") {
                Some(end) => text[..end].to_owned(),
                None => text.to_owned(),
            }
        }
    }
}

/// Text, and where it is.
type Text = Spanned<String>;

/// The entries of a mapping in their order, with the places of their keys.
struct Entries<V>(Vec<(Text, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Entries<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor<V>(PhantomData<V>);

        impl<'de, V: Deserialize<'de>> de::Visitor<'de> for Visitor<V> {
            type Value = Entries<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mapping")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Entries<V>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(Visitor(PhantomData))
    }
}

/// The file's fields as they are written. Every one but `exec` may be missing or null.
#[derive(Deserialize)]
struct Raw {
    exec: Option<Text>,
    test: Option<Text>,
    oneshot: Option<bool>,
    shutdown_timeout: Option<Seconds>,
    after: Option<Vec<Text>>,
    signal: Option<RawSignal>,
    #[serde(default, deserialize_with = "nullable")]
    log: Option<RawLog>,
    env: Option<Entries<String>>,
    dir: Option<Text>,
    kill_mode: Option<RawKillMode>,
    kill_after: Option<Seconds>,
    keep: Option<Vec<Text>>,
    restart: Option<RawRestart>,
    user: Option<String>,
    group: Option<String>,
    limits: Option<Entries<RawLimit>>,
}

#[derive(Deserialize)]
struct RawSignal {
    stop: Option<Text>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawLog {
    Ring,
    Stdout,
    None,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawKillMode {
    All,
    Main,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RawWhen {
    Always,
    OnFailure,
    Never,
}

#[derive(Deserialize)]
struct RawRestart {
    policy: Option<RawWhen>,
    delay: Option<Seconds>,
    max_delay: Option<Spanned<Seconds>>,
    limit: Option<u32>,
    within: Option<Spanned<Seconds>>,
}

/// One number for both, or a mapping.
struct RawLimit {
    soft: u64,
    hard: u64,
}

/// `null` is a value of its own here: no log.
fn nullable<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<RawLog>, D::Error> {
    Ok(Some(
        Option::<RawLog>::deserialize(deserializer)?.unwrap_or(RawLog::None),
    ))
}

/// A time in seconds, with a fraction if need be.
#[derive(Clone, Copy)]
struct Seconds(Duration);

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let seconds = f64::deserialize(deserializer)?;
        if !(0.0..=MAX_SECONDS).contains(&seconds) {
            return Err(de::Error::custom(format!(
                "{seconds:?} is no time: seconds, from 0 to a hundred years"
            )));
        }
        Ok(Self(Duration::from_secs_f64(seconds)))
    }
}

/// A limit's number; `unlimited` is one.
struct Amount(u64);

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.as_str() {
            "unlimited" | "infinity" => Ok(Self(u64::MAX)),
            number => number.parse().map(Self).map_err(|_| {
                de::Error::invalid_value(de::Unexpected::Str(number), &"a number from 0 on, or `unlimited`")
            }),
        }
    }
}

impl<'de> Deserialize<'de> for RawLimit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl<'de> de::Visitor<'de> for Visitor {
            type Value = RawLimit;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number, `unlimited`, or a mapping with soft and hard")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<RawLimit, A::Error> {
                #[derive(Deserialize)]
                struct Pair {
                    soft: Amount,
                    hard: Amount,
                }
                let Pair { soft, hard } = Pair::deserialize(de::value::MapAccessDeserializer::new(map))?;
                if soft.0 > hard.0 {
                    return Err(de::Error::custom("the soft limit is above the hard one"));
                }
                Ok(RawLimit {
                    soft: soft.0,
                    hard: hard.0,
                })
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<RawLimit, E> {
                Ok(RawLimit {
                    soft: number,
                    hard: number,
                })
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<RawLimit, E> {
                match u64::try_from(number) {
                    Ok(number) => self.visit_u64(number),
                    Err(_) => Err(de::Error::invalid_value(de::Unexpected::Signed(number), &self)),
                }
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<RawLimit, E> {
                match text {
                    "unlimited" | "infinity" => self.visit_u64(u64::MAX),
                    text => Err(de::Error::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

impl Raw {
    fn definition(self, base: &Path, warnings: &mut Vec<Complaint>) -> Result<Definition, Complaint> {
        let Some(exec) = self.exec else {
            return Err(Complaint::whole("exec is missing: the command to run"));
        };
        let mut definition = Definition::new(command_or_none(&exec, warnings)?);
        definition.test = match &self.test {
            Some(test) if !test.value.trim().is_empty() => Some(command("test", test)?),
            _ => None,
        };
        definition.oneshot = self.oneshot.unwrap_or_default();
        set(&mut definition.shutdown_timeout, self.shutdown_timeout);
        definition.after = dependencies(self.after.unwrap_or_default())?;
        if let Some(stop) = self.signal.and_then(|signal| signal.stop) {
            definition.stop_signal = stop_signal(&stop)?;
        }
        definition.log = match self.log {
            None | Some(RawLog::Ring) => LogMode::Ring,
            Some(RawLog::Stdout) => LogMode::Stdout,
            Some(RawLog::None) => LogMode::None,
        };
        definition.env = environment(self.env)?;
        definition.dir = directory(self.dir, base)?;
        definition.kill_mode = match self.kill_mode {
            None | Some(RawKillMode::All) => KillMode::All,
            Some(RawKillMode::Main) => KillMode::Main,
        };
        set(&mut definition.kill_after, self.kill_after);
        definition.keep = patterns(&self.keep.unwrap_or_default())?;
        if let Some(restart) = self.restart {
            definition.restart = restart.policy(warnings)?;
        }
        definition.user = self.user;
        definition.group = self.group;
        definition.limits = limits(self.limits)?;
        Ok(definition)
    }
}

fn set(value: &mut Duration, seconds: Option<Seconds>) {
    if let Some(Seconds(duration)) = seconds {
        *value = duration;
    }
}

/// The command to run; none if a quote is not closed. Such a service is there, and fails when it is started, as zinit has
/// it; a file without a command is no good at all.
fn command_or_none(exec: &Text, warnings: &mut Vec<Complaint>) -> Result<Vec<String>, Complaint> {
    match command("exec", exec) {
        Err(complaint) if shell_words::split(&exec.value).is_err() => {
            warnings.push(complaint);
            Ok(Vec::new())
        }
        result => result,
    }
}

fn command(field: &str, text: &Text) -> Result<Vec<String>, Complaint> {
    let complain = |message: &str| Complaint::new(text.referenced, field, message);
    if text.value.contains('\0') {
        return Err(complain("a command cannot have a NUL byte"));
    }
    match shell_words::split(&text.value) {
        Err(_) => Err(complain("a quote is not closed")),
        Ok(words) if words.first().is_none_or(String::is_empty) => Err(complain("there is no command")),
        Ok(words) => Ok(words),
    }
}

fn dependencies(after: Vec<Text>) -> Result<Vec<String>, Complaint> {
    let mut names = Vec::new();
    for (index, name) in after.into_iter().enumerate() {
        if let Some(reason) = fault(&name.value) {
            let message = format!("{:?} cannot be the name of a service: {reason}", name.value);
            return Err(Complaint::new(name.referenced, &format!("after[{index}]"), message));
        }
        if !names.contains(&name.value) {
            names.push(name.value);
        }
    }
    Ok(names)
}

fn stop_signal(text: &Text) -> Result<Signal, Complaint> {
    signal_named(&text.value).ok_or_else(|| {
        let message = match nearest(&text.value.to_uppercase(), Signal::iterator().map(Signal::as_str)) {
            Some(name) => format!("{:?} is no signal: did you mean {name}?", text.value),
            None => format!("{:?} is no signal: write it like SIGTERM", text.value),
        };
        Complaint::new(text.referenced, "signal.stop", message)
    })
}

fn environment(env: Option<Entries<String>>) -> Result<BTreeMap<String, String>, Complaint> {
    let entries = env.into_iter().flat_map(|Entries(entries)| entries);
    let checked = entries.map(|(name, value)| {
        let complain = |message: &str| {
            let field = format!("env.{}", name.value);
            Complaint::new(name.referenced, &field, message)
        };
        if name.value.is_empty() || name.value.contains(['=', '\0']) {
            return Err(complain("a variable's name cannot be empty or have `=` or a NUL byte"));
        }
        if value.contains('\0') {
            return Err(complain("a variable cannot have a NUL byte"));
        }
        Ok((name.value, value))
    });
    checked.collect()
}

fn directory(dir: Option<Text>, base: &Path) -> Result<PathBuf, Complaint> {
    match dir {
        Some(dir) if dir.value.contains('\0') => {
            Err(Complaint::new(dir.referenced, "dir", "a path cannot have a NUL byte"))
        }
        Some(dir) if !dir.value.is_empty() => Ok(base.join(dir.value)),
        _ => Ok(PathBuf::from("/")),
    }
}

fn patterns(keep: &[Text]) -> Result<Vec<KeepPattern>, Complaint> {
    let patterns = keep.iter().enumerate().map(|(index, text)| {
        let complain = |message: String| Complaint::new(text.referenced, &format!("keep[{index}]"), message);
        if text.value.is_empty() {
            return Err(complain("the pattern is empty".to_owned()));
        }
        KeepPattern::new(&text.value).map_err(|error| complain(format!("{:?} is no pattern: {error}", text.value)))
    });
    patterns.collect()
}

fn limits(limits: Option<Entries<RawLimit>>) -> Result<Vec<Limit>, Complaint> {
    let entries = limits.into_iter().flat_map(|Entries(entries)| entries);
    let known =
        entries.map(
            |(name, RawLimit { soft, hard })| match RESOURCES.iter().find(|(known, _)| *known == name.value) {
                Some(&(_, resource)) => Ok(Limit { resource, soft, hard }),
                None => {
                    let field = format!("limits.{}", name.value);
                    let names = RESOURCES.map(|(name, _)| name).join(", ");
                    let message = format!("no such limit; there are {names}");
                    Err(Complaint::new(name.referenced, &field, message))
                }
            },
        );
    known.collect()
}

impl RawRestart {
    fn policy(self, warnings: &mut Vec<Complaint>) -> Result<RestartPolicy, Complaint> {
        let mut policy = RestartPolicy {
            when: match self.policy {
                None | Some(RawWhen::Always) => RestartWhen::Always,
                Some(RawWhen::OnFailure) => RestartWhen::OnFailure,
                Some(RawWhen::Never) => RestartWhen::Never,
            },
            ..RestartPolicy::default()
        };
        set(&mut policy.delay, self.delay);
        policy.max_delay = match &self.max_delay {
            Some(max_delay) if max_delay.value.0 < policy.delay => {
                let message = format!("it is below restart.delay, {} s", policy.delay.as_secs_f64());
                return Err(Complaint::new(max_delay.referenced, "restart.max_delay", message));
            }
            Some(max_delay) => max_delay.value.0,
            None => policy.delay,
        };
        let window = self.within.as_ref().map_or(DEFAULT_WINDOW, |within| within.value.0);
        policy.limit = self.limit.map(|restarts| RestartLimit { restarts, window });
        if let (None, Some(within)) = (self.limit, self.within) {
            let message = "it has no effect without restart.limit";
            warnings.push(Complaint::new(within.referenced, "restart.within", message));
        }
        Ok(policy)
    }
}

/// The fields of the file that nobody knows.
fn unknown_fields(text: &str) -> Result<Vec<Complaint>, Complaint> {
    let Keys(fields) = read(text)?;
    let mut unknown = Vec::new();
    for (key, Keys(inner)) in fields {
        if !FIELDS.contains(&key.value.as_str()) {
            unknown.push(unknown_field(&key, String::new()));
            continue;
        }
        // The keys of `env` are the operator's; those of `limits` have been checked.
        if matches!(key.value.as_str(), "signal" | "restart") {
            for (inner, _) in inner {
                let prefix = format!("{}.", key.value);
                if !FIELDS.contains(&format!("{prefix}{}", inner.value).as_str()) {
                    unknown.push(unknown_field(&inner, prefix));
                }
            }
        }
    }
    Ok(unknown)
}

fn unknown_field(key: &Text, prefix: String) -> Complaint {
    let field = format!("{prefix}{}", key.value);
    let candidates = FIELDS.into_iter().filter(|known| {
        let depth = |path: &str| path.matches('.').count();
        known.starts_with(&prefix) && depth(known) == depth(&prefix)
    });
    let message = match nearest(&field, candidates) {
        Some(known) => format!("unknown field: did you mean {known}?"),
        None => "unknown field".to_owned(),
    };
    Complaint::new(key.referenced, &field, message)
}

/// The candidate that looks most like the text, if one does.
fn nearest<'a>(text: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let scored = candidates.map(|candidate| (strsim::jaro_winkler(text, candidate), candidate));
    let (score, best) = scored.max_by(|(one, _), (other, _)| one.total_cmp(other))?;
    (score > 0.75).then_some(best)
}

/// The keys of a mapping with their places, and those of the mappings in it. Anything else has none.
struct Keys(Vec<(Text, Keys)>);

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Keys;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("anything")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Keys, A::Error> {
                let mut keys = Vec::new();
                while let Some(key) = map.next_key()? {
                    keys.push((key, map.next_value()?));
                }
                Ok(Keys(keys))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Keys, A::Error> {
                while seq.next_element::<de::IgnoredAny>()?.is_some() {}
                Ok(Keys(Vec::new()))
            }

            fn visit_str<E>(self, _: &str) -> Result<Keys, E> {
                Ok(Keys(Vec::new()))
            }

            fn visit_bool<E>(self, _: bool) -> Result<Keys, E> {
                Ok(Keys(Vec::new()))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Keys, E> {
                Ok(Keys(Vec::new()))
            }

            fn visit_u64<E>(self, _: u64) -> Result<Keys, E> {
                Ok(Keys(Vec::new()))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Keys, E> {
                Ok(Keys(Vec::new()))
            }

            fn visit_unit<E>(self) -> Result<Keys, E> {
                Ok(Keys(Vec::new()))
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Document {
        parse(text, Path::new("/etc/zinit")).unwrap_or_else(|complaint| panic!("{text:?}: {complaint}"))
    }

    fn definition(text: &str) -> Definition {
        let document = parsed(text);
        assert_eq!(document.warnings, []);
        document.definition
    }

    fn refused(text: &str) -> String {
        parse(text, Path::new("/etc/zinit")).expect_err(text).to_string()
    }

    #[test]
    fn a_file_with_a_command_has_zinits_defaults() {
        let expected = Definition::new(["sleep", "1 0", "x"]);
        assert_eq!(definition("exec: sleep '1 0' x"), expected);
        let nothing = "exec: sleep '1 0' x\ntest:\noneshot: ~\nshutdown_timeout: null\nafter:\nsignal:\nenv:\ndir:\n\
            kill_mode:\nkill_after:\nkeep:\nrestart:\nuser:\ngroup:\nlimits:\n";
        assert_eq!(definition(nothing), expected);
        assert_eq!(
            definition("exec: sleep '1 0' x\ntest: ''\ndir: ''\nsignal: {}\nrestart: {}\nlog: ring"),
            expected
        );
    }

    #[test]
    fn every_field_is_taken_over() {
        let text = r#"
exec: 'sh -c "echo $HOME # none"'
test: redis-cli -p 7777 PING
oneshot: true
shutdown_timeout: 30
after: [db, net, db]
signal: {stop: sigint}
log: stdout
env: {PORT: 8080, VERSION: 1.10, MODE: 0755, NOTHING: null, YES: yes}
dir: data
kill_mode: main
kill_after: 0.5
keep: ["tmux*", /usr/bin/screen]
restart: {policy: on-failure, delay: 0.25, max_delay: 60, limit: 5, within: 120}
user: www-data
group: 33
limits:
  nofile: 65536
  core: unlimited
  nproc: {soft: 100, hard: unlimited}
"#;
        let definition = definition(text);
        assert_eq!(definition.exec, ["sh", "-c", "echo $HOME # none"]);
        assert_eq!(definition.test.unwrap(), ["redis-cli", "-p", "7777", "PING"]);
        assert!(definition.oneshot);
        assert_eq!(definition.shutdown_timeout, Duration::from_secs(30));
        assert_eq!(definition.after, ["db", "net"]);
        assert_eq!(definition.stop_signal, Signal::SIGINT);
        assert_eq!(definition.log, LogMode::Stdout);
        let env: Vec<_> = definition
            .env
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        assert_eq!(
            env,
            ["MODE=0755", "NOTHING=null", "PORT=8080", "VERSION=1.10", "YES=yes"]
        );
        assert_eq!(definition.dir, Path::new("/etc/zinit/data"));
        assert_eq!(definition.kill_mode, KillMode::Main);
        assert_eq!(definition.kill_after, Duration::from_millis(500));
        assert_eq!(definition.keep.len(), 2);
        let restart = RestartPolicy {
            when: RestartWhen::OnFailure,
            delay: Duration::from_millis(250),
            max_delay: Duration::from_secs(60),
            limit: Some(RestartLimit {
                restarts: 5,
                window: Duration::from_secs(120),
            }),
        };
        assert_eq!(definition.restart, restart);
        assert_eq!(definition.user.as_deref(), Some("www-data"));
        assert_eq!(definition.group.as_deref(), Some("33"));
        let limits: Vec<_> = definition.limits.iter().map(|limit| (limit.soft, limit.hard)).collect();
        assert_eq!(limits, [(65536, 65536), (u64::MAX, u64::MAX), (100, u64::MAX)]);
    }

    #[test]
    fn files_of_other_editors_are_read() {
        for text in [
            "\u{feff}exec: a b\n",
            "exec: a b\r\noneshot: false\r\n",
            "---\nexec: >\n  a\n  b\n",
            "exec: a b # c",
        ] {
            assert_eq!(definition(text).exec, ["a", "b"], "{text:?}");
        }
    }

    #[test]
    fn no_log_is_written_in_two_ways() {
        for text in [
            "exec: a\nlog: none",
            "exec: a\nlog: null",
            "exec: a\nlog: ~",
            "exec: a\nlog:",
        ] {
            assert_eq!(definition(text).log, LogMode::None, "{text:?}");
        }
    }

    #[test]
    fn a_delay_of_its_own_stays_unless_it_may_grow() {
        let restart = definition("exec: a\nrestart: {delay: 7}").restart;
        assert_eq!(
            (restart.delay, restart.max_delay),
            (Duration::from_secs(7), Duration::from_secs(7))
        );
    }

    #[test]
    fn what_is_wrong_is_said_with_line_column_and_field() {
        for (text, complaint) in [
            ("", "exec is missing: the command to run"),
            ("test: a", "exec is missing: the command to run"),
            ("exec: ''", "line 1, column 7: exec: there is no command"),
            ("exec: \"''\"", "line 1, column 7: exec: there is no command"),
            ("exec: a\ntest: a \"", "line 2, column 7: test: a quote is not closed"),
            ("exec: [a, b]", "line 1, column 7: exec: expected string scalar"),
            ("exec: a\noneshot: maybe", "line 2, column 10: oneshot: invalid boolean"),
            (
                "exec: a\nsignal: {stop: SIGTREM}",
                "line 2, column 16: signal.stop: \"SIGTREM\" is no signal: did you mean SIGTERM?",
            ),
            (
                "exec: a\nsignal: {stop: 99}",
                "line 2, column 16: signal.stop: \"99\" is no signal: write it like SIGTERM",
            ),
            (
                "exec: a\nsignal: SIGTERM",
                "line 2, column 9: signal: expected mapping start",
            ),
            (
                "exec: a\nlog: file",
                "line 2, column 6: log: unknown variant `file`, expected one of ring, stdout, none",
            ),
            (
                "exec: a\nshutdown_timeout: -1",
                "line 2, column 19: shutdown_timeout: -1.0 is no time: seconds, from 0 to a hundred years",
            ),
            (
                "exec: a\nshutdown_timeout: .nan",
                "line 2, column 19: shutdown_timeout: NaN is no time: seconds, from 0 to a hundred years",
            ),
            (
                "exec: a\nshutdown_timeout: 1e300",
                "line 2, column 19: shutdown_timeout: 1e300 is no time: seconds, from 0 to a hundred years",
            ),
            (
                "exec: a\nshutdown_timeout: soon",
                "line 2, column 19: shutdown_timeout: invalid floating point",
            ),
            ("exec: a\nafter: b", "line 2, column 8: after: expected sequence start"),
            (
                "exec: a\nafter: [b, ../c]",
                "line 2, column 12: after[1]: \"../c\" cannot be the name of a service: it has a slash, a backslash or a dot",
            ),
            (
                "exec: a\nenv: {'A=B': c}",
                "line 2, column 7: env.A=B: a variable's name cannot be empty or have `=` or a NUL byte",
            ),
            ("exec: a\nenv: [A]", "line 2, column 6: env: expected mapping start"),
            (
                "exec: a\nkeep: ['a[']",
                "line 2, column 8: keep[0]: \"a[\" is no pattern: Pattern syntax error near position 1: invalid range pattern",
            ),
            (
                "exec: a\nrestart: {delay: 9, max_delay: 3}",
                "line 2, column 32: restart.max_delay: it is below restart.delay, 9 s",
            ),
            (
                "exec: a\nrestart: {policy: sometimes}",
                "line 2, column 19: restart.policy: unknown variant `sometimes`, expected one of always, on-failure, never",
            ),
            (
                "exec: a\nlimits: {files: 1}",
                "line 2, column 10: limits.files: no such limit; there are as, core, cpu, data, fsize, locks, memlock, msgqueue, nice, nofile, nproc, rss, rtprio, rttime, sigpending, stack",
            ),
            ("exec: a\nexec: b", "line 2, column 1: exec is there twice"),
            (
                "exec: a\n---\nexec: b",
                "line 3, column 1: one file is one document: there is another one here",
            ),
            ("exec: 'a", "line 1, column 7: unclosed quote"),
            ("- exec: a", "line 1, column 1: expected mapping start"),
            ("\u{0}\u{1}", "line 1, column 1: unexpected character: `\\u{0}'"),
        ] {
            assert_eq!(refused(text), complaint, "{text:?}");
        }
        for text in [
            "exec: a\nlimits: {nofile: -1}",
            "exec: a\nlimits: {nofile: many}",
            "exec: a\nlimits: {nofile: {soft: 2, hard: 1}}",
            "exec: a\nlimits: {nofile: {soft: 2}}",
        ] {
            assert!(refused(text).contains("line 2, column "), "{}", refused(text));
            assert!(refused(text).contains(": limits: "), "{}", refused(text));
        }
    }

    #[test]
    fn what_is_said_is_one_line_whatever_keys_and_values_have_in_them() {
        for text in [
            "exec: a\n\"x\\ny\": {? [}",
            "exec: a\n\"x\\ny\": 1\n\"x\\ny\": 2",
            "exec: a\nlog: \"x\\ny\\e[2J\"",
            "exec: a\nenv: {\"x\\n=\": 1}",
            "exec: a\nlimits: {\"x\\ny\": 1}",
        ] {
            let complaint = refused(text);
            assert!(!complaint.contains(char::is_control), "{complaint:?}");
            assert!(complaint.contains("x\\n"), "{complaint:?}");
        }
        let unknown = parsed("exec: a\n\"x\\ny\": 1").warnings[0].to_string();
        assert_eq!(unknown, "line 2, column 1: x\\ny: unknown field");
    }

    #[test]
    fn a_quote_that_is_not_closed_makes_a_service_that_cannot_start() {
        let document = parsed("oneshot: true\nexec: a 'b");
        assert_eq!(document.definition.exec, [""; 0]);
        assert!(document.definition.oneshot);
        let warnings: Vec<_> = document.warnings.iter().map(ToString::to_string).collect();
        assert_eq!(warnings, ["line 2, column 7: exec: a quote is not closed"]);
    }

    #[test]
    fn unknown_fields_are_named_with_the_nearest_known_one() {
        let document = parsed(
            "exec: a\nshutdown_timeut: 3\nsignal: {stpo: x}\nrestart:\n  polcy: never\nxyzzy: 1\nenv: {any: thing}",
        );
        let warnings: Vec<_> = document.warnings.iter().map(ToString::to_string).collect();
        assert_eq!(
            warnings,
            [
                "line 2, column 1: shutdown_timeut: unknown field: did you mean shutdown_timeout?",
                "line 3, column 10: signal.stpo: unknown field: did you mean signal.stop?",
                "line 5, column 3: restart.polcy: unknown field: did you mean restart.policy?",
                "line 6, column 1: xyzzy: unknown field",
            ]
        );
        assert_eq!(document.definition.env.len(), 1);
    }

    #[test]
    fn bombs_of_aliases_are_refused() {
        let mut text = String::from("exec: a\na0: &a0 [x,x,x,x,x,x,x,x]\n");
        for level in 1..12 {
            let aliases = vec![format!("*a{}", level - 1); 8].join(",");
            text.push_str(&format!("a{level}: &a{level} [{aliases}]\n"));
        }
        refused(&text);
        refused(&format!("exec: a\nx: {}", "[".repeat(10_000)));
    }

    #[test]
    fn a_file_can_be_had_as_it_is() {
        let value = parse_value("exec: a\nenv: {PORT: 80}\nlog:\n").unwrap();
        assert_eq!(
            value,
            serde_json::json!({"exec": "a", "env": {"PORT": 80}, "log": null})
        );
        parse_value("a: [").unwrap_err();
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_it_panic(text in proptest::string::string_regex("(exec|log|env|restart|limits|after|[ -~\n\t:{}\\[\\],&*'\"]|\\PC){0,80}").unwrap()) {
            drop(parse(&text, Path::new("/")));
            drop(parse_value(&text));
        }
    }
}
