"""The lab: what makes, scores and shows policies. Nothing that runs beside an arm imports it."""
