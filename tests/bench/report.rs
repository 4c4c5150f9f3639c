//! The table: rows in the order in which they were measured, floors and verdicts, and what it was measured on.

use std::fmt;
use std::fs;
use std::process::Command;

/// One line of the table.
#[derive(Debug, Clone, Default)]
pub(crate) struct Row {
    pub(crate) what: String,
    pub(crate) ocid: String,
    pub(crate) containerd: String,
    pub(crate) bare: String,
    pub(crate) floors: Vec<Floor>,
}

/// What was promised, and what came of it.
#[derive(Debug, Clone)]
pub(crate) struct Floor {
    text: String,
    /// Measured by promised: at most 1 is met.
    ratio: Option<f64>,
}

impl Floor {
    /// `value` is at most `limit`.
    pub(crate) fn at_most(text: impl Into<String>, value: Option<f64>, limit: Option<f64>) -> Floor {
        let ratio = value.zip(limit).filter(|(_, limit)| *limit > 0.0).map(|(value, limit)| value / limit);
        Floor { text: text.into(), ratio }
    }

    /// `value` is at least `limit`.
    pub(crate) fn at_least(text: impl Into<String>, value: Option<f64>, limit: Option<f64>) -> Floor {
        Floor::at_most(text, limit, value)
    }

    fn verdict(&self) -> String {
        match self.ratio {
            None => "not measured".to_owned(),
            Some(ratio) if ratio <= 1.0 => format!("met ({ratio:.2} of it)"),
            Some(ratio) => format!("**not met** ({ratio:.2} of it)"),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Report {
    head: Vec<String>,
    load_before: String,
    rows: Vec<Row>,
}

impl Report {
    /// Notes the machine and its load.
    pub(crate) fn new(versions: &[String]) -> Report {
        let kernel = read("/proc/sys/kernel/osrelease");
        let cpus = std::thread::available_parallelism().map_or(0, usize::from);
        let model = read("/proc/cpuinfo");
        let model = model.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("?");
        let memory = read("/proc/meminfo");
        let kib: u64 =
            memory.split_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or_default();
        let machine = format!(
            "{cpus} CPUs ({}), {:.0} GiB, kernel {kernel}; {}",
            model.trim_start_matches([' ', '\t', ':']),
            kib as f64 / f64::from(1 << 20),
            versions.join(", "),
        );
        Report { head: vec![machine], load_before: load(), rows: Vec::new() }
    }

    /// Adds a line above the table.
    pub(crate) fn note(&mut self, text: String) {
        self.head.push(text);
    }

    /// Adds a line to the table, and shows it at once: a later failure must not take minutes of measuring with it.
    pub(crate) fn row(&mut self, row: Row) {
        crate::progress(&format!("{}: {} | {} | {}", row.what, row.ocid, row.containerd, row.bare));
        self.rows.push(row);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.head {
            writeln!(f, "{line}")?;
        }
        writeln!(f, "Load average before: {}; after: {}.\n", self.load_before, load())?;
        writeln!(f, "| | ocid | containerd | bare | floor | verdict |\n|---|--:|--:|--:|---|---|")?;
        for row in &self.rows {
            let Row { what, ocid, containerd, bare, floors } = row;
            let texts: Vec<&str> = floors.iter().map(|floor| floor.text.as_str()).collect();
            let verdicts: Vec<String> = floors.iter().map(Floor::verdict).collect();
            let (texts, verdicts) = (texts.join("; "), verdicts.join("; "));
            writeln!(f, "| {what} | {ocid} | {containerd} | {bare} | {texts} | {verdicts} |")?;
        }
        let all = || self.rows.iter().flat_map(|row| &row.floors);
        let met = all().filter(|floor| floor.ratio.is_some_and(|ratio| ratio <= 1.0)).count();
        writeln!(f, "\n{met} of {} floors met.", all().count())
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn load() -> String {
    read("/proc/loadavg").split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

/// The first line that a program says of its version.
pub(crate) fn version(program: &str) -> String {
    let output = Command::new(program).arg("--version").output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or("?").to_owned()
}
