"""Scores systems on tasks, compares them, and draws the results."""

from .generation import ROUTED, Memo, Route, answer_losses, answer_prompts, route_prompts
from .prompts import DataFileError, TaskItem, encode, read_prompts, read_task, render
from .report import EvaluationReport, accuracy_table, draw_report, loss_table, routing_table, write_json
from .runner import NAMED, EvalTask, RoutingScore, SystemScore, TaskScore, score_routing, score_system
from .scoring import MATCHERS, wilson_interval

__all__ = [
    "MATCHERS",
    "NAMED",
    "ROUTED",
    "DataFileError",
    "EvalTask",
    "EvaluationReport",
    "Memo",
    "Route",
    "RoutingScore",
    "SystemScore",
    "TaskItem",
    "TaskScore",
    "accuracy_table",
    "answer_losses",
    "answer_prompts",
    "draw_report",
    "encode",
    "loss_table",
    "read_prompts",
    "read_task",
    "render",
    "route_prompts",
    "routing_table",
    "score_routing",
    "score_system",
    "wilson_interval",
    "write_json",
]
