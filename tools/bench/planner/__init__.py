"""The planner behind `kvfsctl plan`: see DESIGN.md."""
