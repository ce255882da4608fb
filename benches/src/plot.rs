//! The pictures of docs/performance.md.

use std::path::PathBuf;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::report::{Distribution, Report};
use crate::{Result, project};

const SIZE: (u32, u32) = (720, 400);
const COLOURS: [RGBColor; 4] = [
    RGBColor(0x1f, 0x5f, 0xbf),
    RGBColor(0xc0, 0x50, 0x20),
    RGBColor(0x60, 0x60, 0x60),
    RGBColor(0x30, 0x90, 0x50),
];

/// A line: its name, and its points.
type Line = (String, Vec<(f64, f64)>);

pub fn draw(report: &Report) -> Result<()> {
    let by = |value: fn(&crate::report::Throughput) -> f64| {
        report.throughput.iter().map(|point| (point.connections as f64, value(point) / 1e3)).collect()
    };
    let lines: [Line; 3] = [
        ("kmutex, protocol 1".into(), by(|point| point.protocol1)),
        ("kmutex, protocol 2".into(), by(|point| point.protocol2)),
        ("floor".into(), by(|point| point.floor)),
    ];
    throughput("throughput.svg", &lines)?;
    let parts = |distributions: &[Distribution]| -> Vec<Line> {
        let points = |of: &Distribution| {
            of.hundredths.iter().zip(1..).map(|(&took, part)| (took, f64::from(part))).collect()
        };
        distributions.iter().map(|of| (of.name.clone(), points(of))).collect()
    };
    latencies("latency.svg", "lock and release of one connection, µs", &parts(&report.latencies))?;
    latencies("commands.svg", "a whole command, µs", &parts(&report.commands))
}

fn picture(name: &str) -> PathBuf {
    project().join("docs").join(name)
}

fn throughput(name: &str, lines: &[Line]) -> Result<()> {
    let path = picture(name);
    let area = SVGBackend::new(&path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let top = lines.iter().flat_map(|(_, points)| points).map(|point| point.1).fold(0.0, f64::max) * 1.1;
    let mut chart = ChartBuilder::on(&area)
        .margin(15)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d((1.0..20_000.0).log_scale(), 0.0..top)?;
    chart
        .configure_mesh()
        .x_desc("connections, all busy")
        .y_desc("thousand locks and releases a second")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .disable_x_mesh()
        .draw()?;
    for ((name, points), colour) in lines.iter().zip(COLOURS) {
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)).point_size(3))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE).border_style(BLACK.mix(0.3)).draw()?;
    Ok(area.present()?)
}

fn latencies(name: &str, what: &str, lines: &[Line]) -> Result<()> {
    let path = picture(name);
    let area: DrawingArea<_, Shift> = SVGBackend::new(&path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let all = || lines.iter().flat_map(|(_, points)| points).map(|point| point.0);
    let (least, most) = (all().fold(f64::INFINITY, f64::min), all().fold(0.0, f64::max));
    let mut chart = ChartBuilder::on(&area)
        .margin(15)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d((least * 0.9..most * 1.05).log_scale(), 0.0..100.0)?;
    chart
        .configure_mesh()
        .x_desc(what)
        .y_desc("% took no longer")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .disable_x_mesh()
        .draw()?;
    for ((name, points), colour) in lines.iter().zip(COLOURS) {
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE)
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(area.present()?)
}
