//! Line charts with a title, axes and a legend.

use super::axis::Axis;
use super::{Area, GRID, INK, PlotResult, SCALE, TEXT, TITLE, text};
use plotters::chart::{ChartBuilder, LabelAreaPosition, SeriesLabelPosition};
use plotters::coord::ranged1d::ValueFormatter;
use plotters::element::PathElement;
use plotters::style::{Color, RGBColor, WHITE};

/// One line of a chart.
pub(super) struct Line {
    /// Its name in the legend.
    pub name: String,
    /// Its points in order; non-finite ones are skipped.
    pub points: Vec<(f64, f64)>,
    /// Its colour.
    pub colour: RGBColor,
    /// Its width in pixels.
    pub width: u32,
}

/// A line chart; later lines are drawn over earlier ones.
pub(super) struct Chart {
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    pub lines: Vec<Line>,
}

impl Chart {
    /// Fills `area` with the chart.
    pub fn draw(&self, area: &Area<'_>) -> PlotResult {
        let mut chart = ChartBuilder::on(area)
            .caption(&self.title, text(TITLE))
            .margin(10 * SCALE)
            .margin_right(24 * SCALE)
            .set_label_area_size(LabelAreaPosition::Bottom, 48 * SCALE)
            .set_label_area_size(LabelAreaPosition::Left, 72 * SCALE)
            .build_cartesian_2d(self.x.clone(), self.y.clone())?;
        chart
            .configure_mesh()
            .max_light_lines(0)
            .bold_line_style(GRID.stroke_width(SCALE))
            .light_line_style(plotters::style::TRANSPARENT)
            .axis_style(INK.stroke_width(SCALE))
            .label_style(text(TEXT))
            .axis_desc_style(text(TEXT))
            .x_labels(8)
            .y_labels(8)
            .x_desc(&self.x.title)
            .y_desc(&self.y.title)
            // The space separates the label from the axis.
            .y_label_formatter(&|v| self.y.format_ext(v) + " ")
            .draw()?;
        for line in &self.lines {
            let style = line.colour.stroke_width(line.width * SCALE);
            let finite = line.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite());
            let points: Vec<_> = finite.collect();
            // Segment by segment, as plotters draws spikes at sharp corners of a polyline.
            let pieces = points.windows(2).map(|ends| PathElement::new(ends.to_vec(), style));
            chart
                .draw_series(pieces)?
                .label(&line.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 24 * SCALE as i32, y)], style));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .legend_area_size(32 * SCALE)
            .margin(8 * SCALE)
            .label_font(text(TEXT))
            .background_style(WHITE.mix(0.85))
            .border_style(GRID)
            .draw()?;
        Ok(())
    }
}
