# pyright: basic, reportUnusedExpression=false
import matplotlib.pyplot as plt
import pandas as pd

weather = pd.read_csv("seattle-weather.csv", parse_dates=["date"])
monthly = (
    weather.assign(month=weather["date"].dt.month)
    .groupby("month")
    .agg(rain_mm=("precipitation", "sum"), wet_days=("precipitation", lambda p: (p > 0).sum()), high=("temp_max", "mean"))
    .assign(rain_mm=lambda t: t["rain_mm"] / weather["date"].dt.year.nunique())
    .round(1)
)
monthly.to_csv("monthly.csv")

figure, axis = plt.subplots(figsize=(8, 4))
axis.bar(monthly.index, monthly["rain_mm"], color="steelblue", label="rain, mm a month")
axis.set_xlabel("month")
axis.set_title(f"Seattle, {weather['date'].dt.year.min()}-{weather['date'].dt.year.max()}")
right = axis.twinx()
right.plot(monthly.index, monthly["high"], color="firebrick", marker="o", label="mean daily high, C")
figure.legend(loc="lower right", ncols=2, frameon=False)
figure.tight_layout(rect=(0, 0.05, 1, 1))
figure.savefig("weather.png", dpi=120)
plt.close(figure)

print(f"{len(weather)} days, wettest month {monthly['rain_mm'].idxmax()}, driest {monthly['rain_mm'].idxmin()}")
monthly  # noqa: B018 - a notebook shows its last expression
