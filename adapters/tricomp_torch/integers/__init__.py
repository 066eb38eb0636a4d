"""Integer deployment: chosen nodes of a finished model become integers. Imported by name, not by `tricomp_torch`.

>>> plan = integers.plan(model, examples, budget=integers.Budget(top1=0.995))  # doctest: +SKIP
>>> print(plan)  # doctest: +SKIP
>>> small = integers.convert(model, plan)  # doctest: +SKIP
>>> integers.save_file(small, "model.tri", examples)  # doctest: +SKIP
>>> small = integers.load_file("model.tri")  # doctest: +SKIP
"""

from tricomp.errors import BudgetError
from tricomp_torch.integers.convert import convert
from tricomp_torch.integers.files import load_file, save_file
from tricomp_torch.integers.forms import prepare
from tricomp_torch.integers.nodes import Budget, Effect, Fold, NodePlan, Plan
from tricomp_torch.integers.planning import plan
from tricomp_torch.integers.report import report

__all__ = [
    "Budget",
    "BudgetError",
    "Effect",
    "Fold",
    "NodePlan",
    "Plan",
    "convert",
    "load_file",
    "plan",
    "prepare",
    "report",
    "save_file",
]
