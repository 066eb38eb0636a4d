"""Integer deployment: chosen nodes of a finished model become integers. Imported by name, not by `tricomp_torch`.

>>> plan = tricomp_torch.integers.plan(model, examples, budget=Budget(top1=0.995))  # doctest: +SKIP
>>> print(plan)  # doctest: +SKIP
"""

from tricomp.errors import BudgetError
from tricomp_torch.integers.nodes import Budget, Effect, Fold, NodePlan, Plan

__all__ = ["Budget", "BudgetError", "Effect", "Fold", "NodePlan", "Plan"]
