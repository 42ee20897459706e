"""A lab that is as small as it can be, to try the harness on: one slider, one text, one figure."""

CELL = """
import time

import ipywidgets as W
import plotly.graph_objects as go
from libortho.dashboard import Lab


class Tiny(Lab):
    def __init__(self):
        self.alpha = W.FloatSlider(1.0, min=0.0, max=1.0, step=0.05, description="α", continuous_update=False)
        self.fault = W.Checkbox(False, description="fault")
        self.text, self.figure = W.HTML(), go.FigureWidget(go.Bar(x=["off", "on"], y=[0, 1]))
        self.figure.update_layout(height=300, yaxis_range=[0, 1])
        self.text.add_class("tiny-text"), self.figure.add_class("tiny-figure")
        super().__init__("Tiny", [self.alpha, self.fault], [self.text, self.figure])
        self.on(self.alpha, self.update)
        self.update()

    def update(self):
        a = self.alpha.value
        if self.fault.value:
            raise ValueError("fault must be off; clear it")
        self.text.value = f"α = {a:.2f}: the secret ingredient is " + ("cinnamon" if a >= 0.5 else "water")
        self.figure.data[0].y = [1 - a, a]


lab = Tiny()
lab
"""
