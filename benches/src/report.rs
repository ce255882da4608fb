//! What was measured, as a file and as a table.

use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{Result, fail, project};

/// Everything that one run has measured.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Processor, number of them, kernel.
    pub machine: String,
    pub rows: Vec<Row>,
    /// Those about locks that are shared through etcd.
    #[serde(default)]
    pub cluster: Vec<Row>,
    /// Locks and releases a second, by the number of busy connections.
    pub throughput: Vec<Throughput>,
    /// Hundredths of all rounds that took no longer, in microseconds.
    pub latencies: Vec<Distribution>,
    /// The same of whole commands.
    pub commands: Vec<Distribution>,
}

/// One line of the table.
#[derive(Debug, Serialize, Deserialize)]
pub struct Row {
    pub what: String,
    pub ours: f64,
    /// `None`: there is nothing to compare with.
    pub theirs: Option<f64>,
    pub unit: String,
    pub target: Target,
}

/// What a ratio, or a figure without one, should be.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Target {
    AtMost(f64),
    AtLeast(f64),
    /// Whatever it is.
    Open,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Throughput {
    pub connections: u64,
    pub floor: f64,
    pub protocol1: f64,
    pub protocol2: f64,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Distribution {
    pub name: String,
    /// From the first hundredth to the last but one.
    pub hundredths: Vec<f64>,
}

impl Distribution {
    pub fn new(name: &str, values: &[f64]) -> Distribution {
        let hundredths = (1..100).map(|part| crate::percentile(values, f64::from(part) / 100.0)).collect();
        Distribution { name: name.into(), hundredths }
    }
}

impl Row {
    pub fn new(what: &str, ours: f64, theirs: Option<f64>, unit: &str, target: Target) -> Row {
        eprintln!("{what}: {ours:.2} {unit}, {theirs:.2?}");
        Row { what: what.into(), ours, theirs, unit: unit.into(), target }
    }

    fn figure(&self) -> f64 {
        self.theirs.map_or(self.ours, |theirs| self.ours / theirs)
    }

    fn line(&self) -> String {
        let (met, target) = match self.target {
            Target::AtMost(limit) => (Some(self.figure() <= limit), format!("at most {limit}")),
            Target::AtLeast(limit) => (Some(self.figure() >= limit), format!("at least {limit}")),
            Target::Open => (None, "".into()),
        };
        let number = |value: f64| match value {
            value if value.fract() == 0.0 || value >= 1000.0 => format!("{value:.0}"),
            value => format!("{value:.2}"),
        };
        let theirs = self.theirs.map_or("".into(), |theirs| format!("{} {}", number(theirs), self.unit));
        let met = met.map_or("", |met| if met { "yes" } else { "**no**" });
        let figure = self.theirs.map_or("".into(), |_| format!("{:.2}", self.figure()));
        format!(
            "| {} | {} {} | {theirs} | {figure} | {target} | {met} |",
            self.what,
            number(self.ours),
            self.unit
        )
    }
}

const BEGIN: &str = "<!-- what `make bench` writes: -->\n";
const END: &str = "<!-- until here -->\n";

impl Report {
    fn path() -> PathBuf {
        project().join("benches/results.json")
    }

    pub fn load() -> Result<Report> {
        Ok(serde_json::from_slice(&fs::read(Report::path())?)?)
    }

    /// Prints the table, and puts it into docs/performance.md.
    pub fn save(&self) -> Result<()> {
        fs::write(Report::path(), serde_json::to_string_pretty(self)? + "\n")?;
        let table = self.table();
        print!("{table}");
        let page = project().join("docs/performance.md");
        let text = fs::read_to_string(&page)?;
        let Some((head, rest)) = text.split_once(BEGIN) else {
            return fail("docs/performance.md has lost its mark");
        };
        let Some((_, tail)) = rest.split_once(END) else {
            return fail("docs/performance.md has lost its mark");
        };
        Ok(fs::write(page, format!("{head}{BEGIN}\n{table}\n{END}{tail}"))?)
    }

    fn table(&self) -> String {
        let mut table = format!("{}\n\n", self.machine);
        table.push_str(
            "| what | kmutex | the other | ratio | target | met |\n| --- | --- | --- | --- | --- | --- |\n",
        );
        for row in self.rows.iter().chain(&self.cluster) {
            table.push_str(&row.line());
            table.push('\n');
        }
        table
    }
}
