from igstore.calibration.fitting import fit_rule as fit_rule
from igstore.calibration.profiles import Profile as Profile, dense_points as dense_points, profile as profile
from igstore.calibration.subject import Subject as Subject
